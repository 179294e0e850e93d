"""Bodies of the SPC commands that are neither INQUIRY, mode nor log pages (SPC-4 §6; SBC-3 §5).

All of them run on the event loop and none touches the medium, but for START STOP UNIT, which flushes it on
a worker before it stops, and SEND DIAGNOSTIC, which has a look at it there.
"""

from typing import TYPE_CHECKING

from protocol.scsi.attention import condition as reported
from protocol.scsi.cdb import cut, parameter_list_length
from protocol.scsi.commands import Command
from protocol.scsi.inquiry import TARGET_PORT_GROUP
from protocol.scsi.lun import encode_lun
from protocol.scsi.request import GOOD, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "BUFFER_BYTES",
    "ECHO_BYTES",
    "prepare_set_identifying_information",
    "prepare_write_buffer",
    "prevent_allow_medium_removal",
    "read_buffer",
    "report_identifying_information",
    "report_luns",
    "report_supported_operation_codes",
    "report_supported_task_management_functions",
    "report_target_port_groups",
    "report_timestamp",
    "request_sense",
    "send_diagnostic",
    "set_identifying_information",
    "start_stop_unit",
    "test_unit_ready",
    "write_buffer",
]


def test_unit_ready(unit: "LogicalUnit", request: Request) -> Outcome:
    """TEST UNIT READY (SPC-4 §6.47): what it asks, admission has answered."""
    return GOOD


def request_sense(unit: "LogicalUnit", request: Request) -> Outcome:
    """REQUEST SENSE (SPC-4 §6.39): a pending unit attention, or how the unit is, as parameter data."""
    if unit.absent:
        condition = CheckCondition(Sense.LOGICAL_UNIT_NOT_SUPPORTED)
    else:
        attention = unit.take_attention(request.nexus)
        if attention is not None:
            condition = reported(attention)
        elif unit.locked is not None:
            condition = unit.locked()
        elif not unit.medium_present:
            condition = CheckCondition(Sense.MEDIUM_NOT_PRESENT)
        else:
            condition = CheckCondition(Sense.NO_ADDITIONAL_SENSE)
    return Outcome(data_in=cut(condition.build(bool(request.cdb[1] & 0x01)), request.cdb))


_SELFTEST = 0x04


def send_diagnostic(unit: "LogicalUnit", request: Request) -> Outcome:
    """SEND DIAGNOSTIC (SPC-4 §6.42): the default self-test, which reads where a medium begins and ends.

    There are no pages to send (PF with none is no error) and no tests that go on in the background: the row
    refuses both.
    """
    backend, size = unit.backend, unit.block_size
    if request.cdb[1] & _SELFTEST and backend is not None and unit.blocks:
        try:
            for lba in (0, unit.blocks - 1):
                backend.read(lba * size, size)
        except OSError:
            raise CheckCondition(Sense.FAILED_SELF_TEST) from None
    return GOOD


_ALL_LUNS, _WELL_KNOWN, _EVERYTHING = 0x00, 0x01, 0x02


def report_luns(unit: "LogicalUnit", request: Request) -> Outcome:
    """REPORT LUNS (SPC-4 §6.33): the units of the nexus's target. There are no well known ones."""
    select = request.cdb[2]
    if select not in (_ALL_LUNS, _WELL_KNOWN, _EVERYTHING):
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2)
    target = unit.nexuses.get(request.nexus)
    luns = () if select == _WELL_KNOWN or target is None else tuple(target.luns)
    unit.luns_reported(request.nexus)
    listed = b"".join(map(encode_lun, luns))
    return Outcome(data_in=cut(len(listed).to_bytes(4, "big") + bytes(4) + listed, request.cdb))


# -- what we can do -----------------------------------------------------------------------------------

_NOT_SUPPORTED, _SUPPORTED = 0x01, 0x03  # SUPPORT
_CTDP_ALL, _SERVACTV = 0x02, 0x01
_CTDP_ONE = 0x80


def _timeouts(command: Command) -> bytes:
    """Command timeouts descriptor (SPC-4 §6.35.4)."""
    seconds = command.timeout_s.to_bytes(4, "big")
    return b"\x00\x0a\x00\x00" + seconds + seconds


def report_supported_operation_codes(unit: "LogicalUnit", request: Request) -> Outcome:
    """REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35), from the table that dispatch uses."""
    cdb = request.cdb
    rctd = bool(cdb[2] & 0x80)
    option = cdb[2] & 0x07
    if option == 0:
        return Outcome(data_in=cut(_all_commands(unit, rctd), cdb))
    command = _one_command(unit, option, cdb[3], int.from_bytes(cdb[4:6], "big"))
    if command is None:
        return Outcome(data_in=cut(bytes((0, _NOT_SUPPORTED, 0, 0)), cdb))
    head = bytes((0, _SUPPORTED | (_CTDP_ONE if rctd else 0))) + command.length.to_bytes(2, "big")
    return Outcome(data_in=cut(head + command.usage + (_timeouts(command) if rctd else b""), cdb))


def _all_commands(unit: "LogicalUnit", rctd: bool) -> bytes:
    listed = b""
    for row in unit.table:
        commands = () if row is None else (row,) if isinstance(row, Command) else row.values()
        for command in commands:
            action = command.service_action
            flags = (_CTDP_ALL if rctd else 0) | (_SERVACTV if action is not None else 0)
            listed += bytes((command.opcode, 0)) + (action or 0).to_bytes(2, "big")
            listed += bytes((0, flags)) + command.length.to_bytes(2, "big")
            if rctd:
                listed += _timeouts(command)
    return len(listed).to_bytes(4, "big") + listed


def _one_command(unit: "LogicalUnit", option: int, opcode: int, action: int) -> Command | None:
    """The command that REPORTING OPTIONS 1 to 3 name, None if we have none such (SPC-4 table 200)."""
    row = unit.table[opcode]
    if option > 3:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=2)
    if row is None:
        return None
    if isinstance(row, Command):
        if option == 2:  # and it has no service actions
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=2)
        return row if option == 1 or action == 0 else None
    if option == 1:  # and it has service actions
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=2)
    return row.get(action)


def report_supported_task_management_functions(unit: "LogicalUnit", request: Request) -> Outcome:
    """REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 §6.36).

    ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, QUERY TASK, target reset;
    QUERY ASYNC EVENT, QUERY TASK SET, I_T NEXUS RESET. No CLEAR ACA: NormACA is zero.
    """
    data = bytes((0x80 | 0x40 | 0x10 | 0x08 | 0x04 | 0x02, 0x04 | 0x02 | 0x01, 0, 0))
    if request.cdb[2] & 0x80:  # REPD: no time-outs are told
        data = data[:3] + b"\x0c" + bytes(12)
    return Outcome(data_in=cut(data, request.cdb))


def report_target_port_groups(unit: "LogicalUnit", request: Request) -> Outcome:
    """REPORT TARGET PORT GROUPS (SPC-4 §6.37): one group, active/optimized, with every port of the target."""
    form = request.cdb[1] >> 5
    if form > 1:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=7)
    target = unit.nexuses.get(request.nexus)
    ports = sorted({request.nexus.relative_target_port, *(target.ports if target is not None else ())})
    group = bytes((0x00, 0x01)) + TARGET_PORT_GROUP.to_bytes(2, "big") + bytes((0, 0, 0, len(ports)))
    group += b"".join(b"\0\0" + port.to_bytes(2, "big") for port in ports)
    extended = bytes((0x10, 0, 0, 0)) if form else b""
    return Outcome(
        data_in=cut((len(extended) + len(group)).to_bytes(4, "big") + extended + group, request.cdb)
    )


# -- what it is called, what time it is ---------------------------------------------------------------

# INFORMATION TYPE → (name under which it is kept, most bytes) (SPC-4 §5.5)
_IDENTIFYING: dict[int, tuple[str, int]] = {
    0x00: ("peripheral device identifying information", 512),
    0x02: ("peripheral device text identifying information", 256),
}
_INFORMATION_SUPPORTED = 0x7F


def report_identifying_information(unit: "LogicalUnit", request: Request) -> Outcome:
    """REPORT IDENTIFYING INFORMATION (SPC-4 §6.32)."""
    kind = request.cdb[10] >> 1
    if kind == _INFORMATION_SUPPORTED:
        data = b"".join(bytes((k << 1, 0)) + most.to_bytes(2, "big") for k, (_, most) in _IDENTIFYING.items())
    elif kind in _IDENTIFYING:
        data = unit.kept.get(_IDENTIFYING[kind][0], b"")
    else:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=10, bit=7)
    return Outcome(data_in=cut(b"\0\0" + len(data).to_bytes(2, "big") + data, request.cdb))


def prepare_set_identifying_information(unit: "LogicalUnit", request: Request) -> None:
    """SET IDENTIFYING INFORMATION: the type, and no more than it may hold."""
    cdb = request.cdb
    if cdb[10] >> 1 not in _IDENTIFYING:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=10, bit=7)
    if unit.keep is None:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=4)
    length = parameter_list_length(cdb)
    if length > _IDENTIFYING[cdb[10] >> 1][1]:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=6)
    request.transfer_length = length


def set_identifying_information(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """SET IDENTIFYING INFORMATION (SPC-4 §6.45): GOOD when it is stored for good."""
    name, _ = _IDENTIFYING[request.cdb[10] >> 1]
    value = bytes(request.data_out[: request.transfer_length])
    if len(value) < request.transfer_length:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if name.count("text") and value and not _is_text(value):
        raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=0, in_parameters=True)
    assert unit.keep is not None

    def stored(error: Exception | None) -> None:
        if error is not None:
            unit.complete(request, unit.failed(request, error))
            return
        unit.kept[name] = value
        unit.raise_attention(Sense.DEVICE_IDENTIFIER_CHANGED, except_nexus=request.nexus)
        unit.complete(request, GOOD)

    unit.keep(name, value, stored)
    return None


def _is_text(value: bytes) -> bool:
    """A null-terminated UTF-8 string (SPC-4 §4.3.2)."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return value.endswith(b"\0")


def report_timestamp(unit: "LogicalUnit", request: Request) -> Outcome:
    """REPORT TIMESTAMP (SPC-4 §6.38): milliseconds since 1970, set by the host's clock (origin 011b)."""
    milliseconds = int(unit.now() * 1000)
    return Outcome(data_in=cut(b"\x00\x0a\x03\x00" + milliseconds.to_bytes(6, "big") + b"\0\0", request.cdb))


# -- buffers ------------------------------------------------------------------------------------------

ECHO_BYTES = 4096
"""Echo buffer of each nexus: the least that tools test with, times the sessions."""
BUFFER_BYTES = 65536
"""Data buffer of each unit, shared by all nexuses; it takes memory from the first write on. What tools that
test a link move at once."""
_DATA, _DESCRIPTOR, _ECHO, _ECHO_DESCRIPTOR = 0x02, 0x03, 0x0A, 0x0B


def _buffer_offset(cdb: bytes) -> int:
    """BUFFER OFFSET, in the one buffer that there is."""
    if cdb[2]:  # BUFFER ID
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2)
    offset = int.from_bytes(cdb[3:6], "big")
    if offset > BUFFER_BYTES:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=3)
    return offset


def prepare_write_buffer(unit: "LogicalUnit", request: Request) -> None:
    """WRITE BUFFER: into the data buffer (02h), or the echo buffer (0Ah), which has neither id nor offset."""
    cdb = request.cdb
    mode = cdb[1] & 0x1F
    if mode not in (_DATA, _ECHO):
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=4)
    room = BUFFER_BYTES - _buffer_offset(cdb) if mode == _DATA else ECHO_BYTES
    length = parameter_list_length(cdb)
    if length > room:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=6)
    request.transfer_length = length


def write_buffer(unit: "LogicalUnit", request: Request) -> Outcome:
    """WRITE BUFFER (SPC-4 §6.49.4, §6.49.9). The data buffer is the unit's, the echo buffer the nexus's."""
    data = bytes(request.data_out[: request.transfer_length])
    if request.cdb[1] & 0x1F == _ECHO:
        unit.echo[request.nexus] = data
    elif data:
        if not unit.buffer:
            unit.buffer = bytearray(BUFFER_BYTES)
        offset = _buffer_offset(request.cdb)
        unit.buffer[offset : offset + len(data)] = data
    return GOOD


def read_buffer(unit: "LogicalUnit", request: Request) -> Outcome:
    """READ BUFFER: data, echo buffer, and the descriptor of each (SPC-4 §6.23.4 to §6.23.7)."""
    cdb = request.cdb
    mode = cdb[1] & 0x1F
    if mode == _DATA:
        offset = _buffer_offset(cdb)
        data = bytes(unit.buffer[offset:]) if unit.buffer else bytes(BUFFER_BYTES - offset)
    elif mode == _DESCRIPTOR:
        # OFFSET BOUNDARY 0: any byte; a buffer that is not there has a descriptor of zeros
        data = bytes(4) if cdb[2] else b"\0" + BUFFER_BYTES.to_bytes(3, "big")
    elif mode == _ECHO_DESCRIPTOR:
        data = b"\0\0" + ECHO_BYTES.to_bytes(2, "big")
    elif mode == _ECHO:
        echo = unit.echo.get(request.nexus)
        if echo is None:
            raise CheckCondition(Sense.COMMAND_SEQUENCE_ERROR)
        data = echo
    else:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=4)
    return Outcome(data_in=cut(data, cdb))


# -- the medium comes and goes (SBC-3 §5.25, SPC-4 §6.22) ----------------------------------------------


def prevent_allow_medium_removal(unit: "LogicalUnit", request: Request) -> Outcome:
    """PREVENT ALLOW MEDIUM REMOVAL: it is prevented while any nexus prevents it."""
    if request.cdb[4] & 0x01:
        unit.prevented_by[request.nexus] = None
    else:
        unit.prevented_by.pop(request.nexus, None)
    return GOOD


def start_stop_unit(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """START STOP UNIT (SBC-3 §5.25).

    LOEJ loads or ejects a removable medium. There is no motor: START alone and the power conditions change
    nothing, but what stops first brings its data to the medium, unless NO_FLUSH.
    """
    flags = request.cdb[4]
    start, eject_or_load, no_flush = flags & 0x01, flags & 0x02, flags & 0x04
    if flags & 0xF0:
        return GOOD
    if eject_or_load:
        if not unit.config.removable:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=4, bit=1)
        if unit.removal_prevented:
            raise CheckCondition(Sense.MEDIUM_REMOVAL_PREVENTED)

    def move() -> Outcome:
        if eject_or_load:
            if unit.removal_prevented:  # since then
                return unit.check(CheckCondition(Sense.MEDIUM_REMOVAL_PREVENTED))
            unit.load(bool(start), request.nexus)
        return GOOD

    if start or no_flush or not unit.medium_present:
        return move()
    unit.flush_then(request, move)
    return None
