"""READ and WRITE without a ``Task``: a special case of ``Connection._scsi_command``, for speed alone.

Nearly all commands of a disk in use are READ(10/16) and WRITE(10/16) that can be done at once: their turn
has come, nothing in the unit stands in the way, the data is all here or is in memory, and exactly as many
bytes move as the initiator expects. For these the handler made here reads header and CDB with one
``Struct``, asks the unit for the bytes (or hands it the bytes), and queues the one PDU of the answer.

Rule 1: it may only ever answer what the general path would answer, byte for byte and counter for counter;
``tests/protocol/test_fastpath.py`` runs the same traffic through both. Whatever is not plain goes to the
general path, from the beginning and with nothing changed: when in doubt, there.

What stands behind a command that went the general way in the same wake-up goes there too, and does not pass
it: that one is begun at the end of the wake-up. SIMPLE tasks might (SAM-5 §8.6); it would be a surprise.

Rule 2: nothing is decided here that is decided elsewhere. Whether a unit is free to act at once is
``LogicalUnit.read_at_once`` and ``write_at_once``.

With a data digest every byte has to be looked at, so a READ takes a copy, never mapped memory.

A 4 KiB READ, 32 in a wake-up, from memory to memory: 1.7 µs here, 5.1 µs by the general path (CPython 3.11);
with both digests, from a file: 7 to 11 µs here and 12.7 µs by the general path, on a busy machine.
"""

from struct import Struct
from typing import TYPE_CHECKING

from protocol import serial
from protocol.bhs import DataIn, ScsiResponse
from protocol.digest import digest
from protocol.enums import RESERVED_TAG
from protocol.framer import Handler
from protocol.limits import MAX_PLAIN_READ, MAX_PLAIN_REPLIES

if TYPE_CHECKING:
    from protocol.connection import Connection

__all__ = ["scsi_command_handler"]

# Opcode, flags, lengths, LUN, ITT, EDTL, CmdSN; operation code, byte 1, LBA, group, blocks, control of a
# 10-byte CDB (RFC 7143 §11.3; SBC-3 §5.12). The last five are read again where the CDB has 16 bytes.
_HEAD = Struct("!BB2xI8sIII4xBBIBHB").unpack_from
_CDB_16 = Struct("!QIBB").unpack_from  # LBA, blocks, group, control
_CDB_16_AT = 34

_READS = frozenset((0x28, 0x88))
_WRITES = frozenset((0x2A, 0x8A))
_CDBS_OF_16 = frozenset((0x88, 0x8A))
_READ = 0xC1
"""Flags of a SCSI Command: F, R, and the attribute SIMPLE."""
_WRITE = 0xA1
"""F, W, SIMPLE: all data is in this PDU."""

_DATA_IN = DataIn.LAYOUT.pack
_RESPONSE = ScsiResponse.LAYOUT.pack
_NO_LUN = bytes(8)
_MASK = serial.MASK
_HALF = 0x80000000


def scsi_command_handler(connection: "Connection", general: Handler) -> Handler:
    """The handler of SCSI Command PDUs of a normal session.

    Args:
        general: takes what is not plain.
    """
    session = connection.session
    assert session is not None and session.target is not None
    target = session.target
    nexus = session.nexus
    tasks = session.tasks
    keys = session.keys
    longest_in = min(keys.max_burst_length, MAX_PLAIN_READ)
    longest_out = keys.first_burst_length if keys.immediate_data else 0
    header_digest = connection.keys.header_digest
    data_digest = connection.keys.data_digest

    def handle(view: memoryview, at: int, data: memoryview) -> None:
        (
            opcode, flags, lengths, lun, tag, expected, cmd_sn,
            operation, byte1, lba, group, blocks, control,
        ) = _HEAD(view, at)  # fmt: skip
        if operation in _CDBS_OF_16:
            lba, blocks, group, control = _CDB_16(view, at + _CDB_16_AT)
        max_cmd_sn = session.max_cmd_sn
        if (
            opcode != 0x01
            or byte1
            or group
            or control
            or cmd_sn != session.exp_cmd_sn
            or (max_cmd_sn - cmd_sn) & _MASK >= _HALF
            or not expected
            or tag in tasks
            or connection.events
        ):
            general(view, at, data)
            return
        unit = target.unit_for(lun)
        if flags == _READ and operation in _READS:
            if (
                lengths
                or expected > longest_in
                or expected > connection.send_limit
                or expected & 3
                or len(connection.out) > MAX_PLAIN_REPLIES
            ):
                general(view, at, data)
                return
            found = unit.read_at_once(operation, lba, blocks, expected, data_digest)
            if found is None:
                general(view, at, data)
                return
            session.bytes_read += expected
        elif (
            flags == _WRITE
            and lengths == expected <= longest_out
            and operation in _WRITES
            and unit.write_at_once(operation, lba, blocks, data, nexus)
        ):
            found = None
            session.bytes_written += expected
        else:
            general(view, at, data)
            return
        session.commands += 1
        session.exp_cmd_sn = exp_cmd_sn = (cmd_sn + 1) & _MASK
        session.max_cmd_sn = max_cmd_sn = (max_cmd_sn + 1) & _MASK
        stat_sn = connection.stat_sn
        connection.stat_sn = (stat_sn + 1) & _MASK
        out = connection.out
        if found is None:
            header = _RESPONSE(0x21, 0x80, 0, 0, 0, tag, 0, stat_sn, exp_cmd_sn, max_cmd_sn, 0, 0, 0)
            out.append(header + digest(header) if header_digest else header)
        else:
            header = _DATA_IN(
                0x25, 0x81, 0, expected, _NO_LUN, tag, RESERVED_TAG, stat_sn, exp_cmd_sn, max_cmd_sn, 0, 0, 0
            )
            out.append(header + digest(header) if header_digest else header)
            out.append(found)
            if data_digest:
                out.append(digest(found))
        if session.held:
            session.release_held()

    return handle
