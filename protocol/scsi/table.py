"""THE command table: one row per opcode or service action. Everything that is decided per command is here.

The hexadecimal column is the CDB usage data of REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35.3): the opcode,
then a mask. A bit that is clear in it must be zero in the CDB, else INVALID FIELD IN CDB with a pointer to
it; so RD/WR/VRPROTECT, NACA, ANCHOR and all that is obsolete or reserved are refused by the row alone.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from protocol.scsi import (
    block,
    compare,
    control,
    format_unit,
    inquiry,
    log,
    mode,
    provisioning,
    reserve,
    sanitize,
    thirdparty,
)
from protocol.scsi.commands import Access, Body, Command, Data, Needs, Row, Runs

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = ["ROWS", "table_for"]

READY = Needs.READY
MEDIUM = Needs.READY | Needs.MEDIUM
RANGE = MEDIUM | Needs.LBA_RANGE
WRITABLE = RANGE | Needs.WRITABLE

SHORT_BYTES = 256 * 2**10
"""Of commands whose ranges tend to be long, those up to this are done beside READ and WRITE."""

LONG_S = 600
"""Time-out of commands that may have the whole medium to go through, seconds."""


def _row(name: str, usage: str, body: Body, action: int | None = None, **columns: Any) -> Command:
    mask = bytes.fromhex(usage)
    return Command(mask[0], name, body, mask, action, **columns)


def _removable(unit: "LogicalUnit") -> bool:
    return unit.config.removable


def _thin(unit: "LogicalUnit") -> bool:
    return unit.thin


def _keeps(unit: "LogicalUnit") -> bool:
    return unit.keep is not None


_in = partial(_row, data=Data.IN)
_exempt = partial(_in, access=Access.EXEMPT)
_inspect = partial(_in, access=Access.READ)  # tells of the unit, and conflicts as a READ does
_out = partial(_row, data=Data.OUT, access=Access.WRITE, needs=READY)

_select = partial(_out, prepare=mode.prepare_select)

_reservation_in = partial(_in, body=reserve.persistent_reserve_in, access=Access.PERSISTENT_IN)
_reservation_out = partial(
    _out,
    body=reserve.persistent_reserve_out,
    access=Access.PERSISTENT_OUT,
    needs=Needs.NOTHING,
    prepare=reserve.prepare_persistent_reserve_out,
)

# the copy manager checks the units named
_copy = partial(_out, needs=Needs.NOTHING, timeout_s=LONG_S, limited=True, moves=0)
_token = partial(_out, prepare=thirdparty.prepare_token_command, timeout_s=LONG_S, limited=True, moves=0)
_sanitize = partial(
    _out,
    body=sanitize.sanitize,
    needs=Needs.MEDIUM | Needs.WRITABLE,  # not READY: it may follow one that failed
    prepare=sanitize.prepare_sanitize,
    exclusive=True,  # what runs when it comes must not write behind it
    timeout_s=LONG_S,
    limited=True,
    moves=0,
)

_read = partial(
    _in,
    needs=RANGE,
    access=Access.READ,
    runs=Runs.NOWAIT,
    nowait=block.read_nowait,
    begin=block.begin_read,
    prepare=block.prepare_rw,
)
_write = partial(
    _out,
    needs=WRITABLE,
    runs=Runs.NOWAIT,
    nowait=block.write_nowait,
    begin=block.begin_write,
    prepare=block.prepare_rw,
)
_verify = partial(
    _row,
    data=Data.OUT,
    needs=RANGE,
    access=Access.READ,
    runs=Runs.WORKER,
    prepare=compare.prepare_verify,
    limited=True,
    moves=0,
    long_bytes=SHORT_BYTES,
)
_write_and_verify = partial(
    _out, needs=WRITABLE, runs=Runs.WORKER, prepare=compare.prepare_write_and_verify, moves=2
)
_modify = partial(_out, needs=WRITABLE, runs=Runs.WORKER, exclusive=True)
_write_same = partial(
    _out,
    needs=WRITABLE,
    runs=Runs.WORKER,
    prepare=provisioning.prepare_write_same,
    timeout_s=LONG_S,
    moves=0,
    long_bytes=SHORT_BYTES,
)
_prefetch = partial(
    _row,
    needs=RANGE,
    access=Access.READ,
    runs=Runs.NOWAIT,
    nowait=block.prefetch_nowait,
    prepare=block.prepare_range,
    limited=True,
    moves=0,
    long_bytes=SHORT_BYTES,
)
_synchronize = partial(
    _row,
    needs=RANGE,
    access=Access.WRITE,
    runs=Runs.NOWAIT,
    nowait=block.synchronize_cache_nowait,
    begin=block.begin_synchronize_cache,
    after=block.after_synchronize_cache,
    prepare=block.prepare_range,
    flushes=True,
    timeout_s=LONG_S,
)
_capacity = partial(_in, needs=MEDIUM)

ROWS: tuple[Command, ...] = (
    # -- SPC-4 -----------------------------------------------------------------------------------
    # The high bits of byte 1 of these three are the LUN of SCSI-2, which NetBSD sends until it knows better.
    _row("TEST UNIT READY", "00E000000000", control.test_unit_ready, needs=MEDIUM),
    _exempt("REQUEST SENSE", "03E10000FF00", control.request_sense),
    _exempt("INQUIRY", "12E1FFFFFF00", inquiry.inquiry),
    # PF says how pages are laid out, and there are none; DEVOFFL and UNITOFFL allow more than is done
    _row(
        "SEND DIAGNOSTIC",
        "1D1700000000",
        control.send_diagnostic,
        needs=MEDIUM,
        runs=Runs.WORKER,
        access=Access.WRITE,
    ),
    _select("MODE SELECT(6)", "15110000FF00", mode.select),
    _inspect("MODE SENSE(6)", "1A08FFFFFF00", mode.sense),
    _select("MODE SELECT(10)", "55110000000000FFFF00", mode.select),
    _inspect("MODE SENSE(10)", "5A18FFFF000000FFFF00", mode.sense),
    _row(
        "PREVENT ALLOW MEDIUM REMOVAL",
        "1E0000000100",
        control.prevent_allow_medium_removal,
        needs=READY,
        access=Access.PREVENT,
        offered=_removable,
    ),
    _out("WRITE BUFFER", "3B1FFFFFFFFFFFFFFF00", control.write_buffer, prepare=control.prepare_write_buffer),
    _inspect("READ BUFFER", "3C1FFFFFFFFFFFFFFF00", control.read_buffer),
    _in("LOG SENSE", "4D00FFFF00FFFFFFFF00", log.log_sense, runs=Runs.NOWAIT, nowait=log.log_sense_nowait),
    _exempt("REPORT LUNS", "A000FF000000FFFFFFFF0000", control.report_luns),
    _in(
        "REPORT IDENTIFYING INFORMATION",
        "A3050000 0000FFFFFFFF FE00",
        control.report_identifying_information,
        0x05,
    ),
    _exempt(
        "REPORT TARGET PORT GROUPS", "A3EA0000 0000FFFFFFFF 0000", control.report_target_port_groups, 0x0A
    ),
    _inspect(
        "REPORT SUPPORTED OPERATION CODES",
        "A30C87FF FFFFFFFFFFFF 0000",
        control.report_supported_operation_codes,
        0x0C,
    ),
    _inspect(
        "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
        "A30D8000 0000FFFFFFFF 0000",
        control.report_supported_task_management_functions,
        0x0D,
    ),
    _in("REPORT TIMESTAMP", "A30F0000 0000FFFFFFFF 0000", control.report_timestamp, 0x0F),
    _out(
        "SET IDENTIFYING INFORMATION",
        "A4060000 0000FFFFFFFF FE00",
        control.set_identifying_information,
        0x06,
        prepare=control.prepare_set_identifying_information,
        offered=_keeps,
    ),
    *(
        _reservation_in(name, f"5E{action:02X}0000000000FFFF00", action=action)
        for action, name in enumerate(
            ("READ KEYS", "READ RESERVATION", "REPORT CAPABILITIES", "READ FULL STATUS")
        )
    ),
    *(
        _reservation_out(name, f"5F{action:02X}FF0000FFFFFFFF00", action=action)
        for action, name in enumerate(
            (
                "REGISTER",
                "RESERVE",
                "RELEASE",
                "CLEAR",
                "PREEMPT",
                "PREEMPT AND ABORT",
                "REGISTER AND IGNORE EXISTING KEY",
                "REGISTER AND MOVE",
            )
        )
    ),
    _row("RESERVE(6)", "160000000000", reserve.reserve, access=Access.RESERVE),
    _row("RESERVE(10)", "56000000000000000000", reserve.reserve, access=Access.RESERVE),
    _row("RELEASE(6)", "170000000000", reserve.release, access=Access.RELEASE),
    _row("RELEASE(10)", "57000000000000000000", reserve.release, access=Access.RELEASE),
    # -- third-party copy ------------------------------------------------------------------------
    _copy(
        "EXTENDED COPY(LID1)",
        "83000000000000000000FFFFFFFF0000",
        thirdparty.extended_copy,
        0x00,
        prepare=thirdparty.prepare_extended_copy,
    ),
    _token(
        "POPULATE TOKEN",
        "831000000000FFFFFFFFFFFFFFFF1F00",
        thirdparty.populate_token,
        0x10,
        needs=MEDIUM,
        access=Access.READ,
    ),
    _token(
        "WRITE USING TOKEN",
        "831100000000FFFFFFFFFFFFFFFF1F00",
        thirdparty.write_using_token,
        0x11,
        needs=MEDIUM | Needs.WRITABLE,
    ),
    _inspect(
        "RECEIVE COPY STATUS(LID1)",
        "8400FF00000000000000FFFFFFFF0000",
        thirdparty.receive_copy_status,
        0x00,
    ),
    _inspect(
        "RECEIVE COPY OPERATING PARAMETERS",
        "84030000000000000000FFFFFFFF0000",
        thirdparty.receive_operating_parameters,
        0x03,
    ),
    _inspect(
        "RECEIVE ROD TOKEN INFORMATION",
        "8407FFFFFFFF00000000FFFFFFFF0000",
        thirdparty.receive_rod_token_information,
        0x07,
    ),
    # -- SBC-3: reading and writing --------------------------------------------------------------
    _read("READ(6)", "081FFFFFFF00", block.read, prepare=block.prepare_rw6),
    _read("READ(10)", "281AFFFFFFFF1FFFFF00", block.read),
    _read("READ(12)", "A81AFFFFFFFFFFFFFFFF1F00", block.read),
    _read("READ(16)", "881AFFFFFFFFFFFFFFFFFFFFFFFF1F00", block.read),
    _write("WRITE(6)", "0A1FFFFFFF00", block.write, prepare=block.prepare_rw6),
    _write("WRITE(10)", "2A1AFFFFFFFF1FFFFF00", block.write),
    _write("WRITE(12)", "AA1AFFFFFFFFFFFFFFFF1F00", block.write),
    _write("WRITE(16)", "8A1AFFFFFFFFFFFFFFFFFFFFFFFF1F00", block.write),
    _modify(
        "WRITE ATOMIC(16)",
        "9C1AFFFFFFFFFFFFFFFFFFFFFFFF1F00",
        block.write_atomic,
        prepare=block.prepare_write_atomic,
    ),
    _write_and_verify("WRITE AND VERIFY(10)", "2E16FFFFFFFF1FFFFF00", compare.write_and_verify),
    _write_and_verify("WRITE AND VERIFY(12)", "AE16FFFFFFFFFFFFFFFF1F00", compare.write_and_verify),
    _write_and_verify("WRITE AND VERIFY(16)", "8E16FFFFFFFFFFFFFFFFFFFFFFFF1F00", compare.write_and_verify),
    _verify("VERIFY(10)", "2F16FFFFFFFF1FFFFF00", compare.verify),
    _verify("VERIFY(12)", "AF16FFFFFFFFFFFFFFFF1F00", compare.verify),
    _verify("VERIFY(16)", "8F16FFFFFFFFFFFFFFFFFFFFFFFF1F00", compare.verify),
    _modify(
        "COMPARE AND WRITE",
        "891AFFFFFFFFFFFFFFFF000000FF1F00",
        compare.compare_and_write,
        runs=Runs.NOWAIT,
        nowait=compare.compare_and_write_nowait,
        prepare=compare.prepare_compare_and_write,
        moves=2,
    ),
    _modify(
        "ORWRITE(16)", "8B1AFFFFFFFFFFFFFFFFFFFFFFFF1F00", compare.orwrite, prepare=block.prepare_rw, moves=2
    ),
    _write_same("WRITE SAME(10)", "4108FFFFFFFF1FFFFF00", provisioning.write_same),
    _write_same("WRITE SAME(16)", "9309FFFFFFFFFFFFFFFFFFFFFFFF1F00", provisioning.write_same),
    _out(
        "UNMAP",
        "420000000000 1FFFFF00",
        provisioning.unmap,
        needs=WRITABLE,
        runs=Runs.WORKER,
        prepare=provisioning.prepare_unmap,
        moves=0,
        offered=_thin,
        timeout_s=LONG_S,
    ),
    # bytes 3 and 4: INTERLEAVE of SCSI-2, which means nothing any more
    _sanitize(
        "FORMAT UNIT",
        "043F00FFFF00",
        body=format_unit.format_unit,
        prepare=format_unit.prepare_format_unit,
    ),
    _sanitize("SANITIZE, OVERWRITE", "48A10000000000FFFF00", action=0x01),
    _sanitize("SANITIZE, BLOCK ERASE", "48A20000000000FFFF00", action=0x02),
    _sanitize("SANITIZE, CRYPTOGRAPHIC ERASE", "48A30000000000FFFF00", action=0x03),
    _sanitize(
        "SANITIZE, EXIT FAILURE MODE",
        "489F0000000000FFFF00",
        body=sanitize.exit_failure_mode,
        needs=Needs.NOTHING,
        action=0x1F,
    ),
    # -- SBC-3: caches, and what the medium is like ----------------------------------------------
    _prefetch("PRE-FETCH(10)", "3402FFFFFFFF1FFFFF00", block.prefetch),
    _prefetch("PRE-FETCH(16)", "9002FFFFFFFFFFFFFFFFFFFFFFFF1F00", block.prefetch),
    # bit 2 of byte 1, SYNC_NV, is obsolete: who sets it asks for less than is done
    _synchronize("SYNCHRONIZE CACHE(10)", "3506FFFFFFFF1FFFFF00", block.synchronize_cache),
    _synchronize("SYNCHRONIZE CACHE(16)", "9106FFFFFFFFFFFFFFFFFFFFFFFF1F00", block.synchronize_cache),
    _row(
        "START STOP UNIT",
        "1B01000FF700",
        control.start_stop_unit,
        needs=READY,
        access=Access.START_STOP,
        timeout_s=LONG_S,
    ),
    _capacity("READ CAPACITY(10)", "25000000000000000000", provisioning.read_capacity10),
    _capacity("READ CAPACITY(16)", "9E100000000000000000FFFFFFFF0000", provisioning.read_capacity16, 0x10),
    _capacity(
        "GET LBA STATUS",
        "9E12FFFFFFFFFFFFFFFFFFFFFFFF0000",
        provisioning.get_lba_status,
        0x12,
        access=Access.READ,
        runs=Runs.WORKER,
        prepare=provisioning.prepare_get_lba_status,
    ),
    _capacity(
        "READ DEFECT DATA(10)", "37001F00000000FFFF00", provisioning.read_defect_data10, access=Access.READ
    ),
    _capacity(
        "READ DEFECT DATA(12)",
        "B71FFFFFFFFFFFFFFFFF0000",
        provisioning.read_defect_data12,
        access=Access.READ,
    ),
)


def _assemble(rows: Iterable[Command]) -> list[Row]:
    table: list[Row] = [None] * 256
    for command in rows:
        at = table[command.opcode]
        if command.service_action is None:
            if at is not None:
                raise TypeError(f"{command.name}: opcode {command.opcode:02X}h has a row already")
            table[command.opcode] = command
        else:
            actions = {} if at is None else at
            if isinstance(actions, Command) or command.service_action in actions:
                raise TypeError(f"{command.name}: opcode {command.opcode:02X}h has such a row already")
            actions[command.service_action] = command
            table[command.opcode] = actions
    return table


_ABSENT = tuple(row for row in ROWS if row.opcode in (0x03, 0x12, 0xA0))
"""What a LUN without a unit answers: REQUEST SENSE, INQUIRY, REPORT LUNS (SPC-4 §6.4.1, SAM-5 §4.7.2)."""
_tables: dict[tuple[Command, ...], Sequence[Row]] = {}


def table_for(unit: "LogicalUnit") -> Sequence[Row]:
    """The commands of a unit by opcode: 256 entries, shared by all units that offer the same."""
    rows = _ABSENT if unit.absent else tuple(row for row in ROWS if row.offered is None or row.offered(unit))
    if rows not in _tables:
        _tables[rows] = _assemble(rows)
    return _tables[rows]
