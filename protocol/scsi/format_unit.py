"""FORMAT UNIT: the medium as it was made, in the background, to the end (SBC-3 r36 §5.3, §4.7.3.3).

There are no defects to certify and no tracks to write, so a format comes down to what the blocks read as
afterwards. Without an initialization pattern every block of a thin medium is given back where that promises
zeros, and else zeros are written over it; with one, every block is written with it. Block size and capacity
stay: those are the operator's. Protection information is of type 0 alone, and a defect list may only be
empty, for there is nothing to map out.

The work is that of SANITIZE (``sanitize.py``): kept before it begins, resumed after a restart, the unit
locked meanwhile with FORMAT IN PROGRESS and its progress. One that failed leaves MEDIUM FORMAT CORRUPTED
until a FORMAT UNIT, or a SANITIZE, has succeeded.
"""

from typing import TYPE_CHECKING

from protocol.scsi import sanitize
from protocol.scsi.block import medium, set_range
from protocol.scsi.request import GOOD, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = ["format_unit", "prepare_format_unit"]

_FMTDATA, _CMPLST, _LONGLIST, _DEFECT_LIST_FORMAT = 0x10, 0x08, 0x20, 0x07
_FOV, _DPRY, _DCRT, _STPF, _IP, _IMMED = 0x80, 0x40, 0x20, 0x10, 0x08, 0x02
_DEFAULT_PATTERN, _REPEATED_PATTERN = 0x00, 0x01
_SHORT_HEADER_BYTES, _LONG_HEADER_BYTES, _PATTERN_HEADER_BYTES = 4, 8, 4


def prepare_format_unit(unit: "LogicalUnit", request: Request) -> None:
    """FORMAT UNIT: its parameter list is as long as the initiator says that it sends (there is no length in
    the CDB), up to what a header and a pattern of a block come to."""
    flags = request.cdb[1]
    sanitize.check_idle(unit)
    set_range(unit, request, 0, unit.blocks)
    if not flags & _FMTDATA:
        if flags & (_CMPLST | _LONGLIST | _DEFECT_LIST_FORMAT):
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=(flags & 0x2F).bit_length() - 1)
        return
    header = _header_bytes(request)
    if not header <= request.expected_out <= header + _PATTERN_HEADER_BYTES + unit.block_size:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    request.transfer_length = request.expected_out


def _header_bytes(request: Request) -> int:
    return _LONG_HEADER_BYTES if request.cdb[1] & _LONGLIST else _SHORT_HEADER_BYTES


def _wrong(at: int, bit: int | None = None) -> CheckCondition:
    return CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=at, bit=bit, in_parameters=True)


def _parameters(unit: "LogicalUnit", request: Request) -> tuple[bool, bytes]:
    """IMMED, and the pattern for each block (empty: the default), of a parameter list (SBC-3 tables 37 to
    41)."""
    data = bytes(request.data_out[: request.transfer_length])
    header = _header_bytes(request)
    if len(data) < request.transfer_length:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if data[0] & 0x07:  # PROTECTION FIELD USAGE
        raise _wrong(0, 2)
    flags = data[1]
    if not flags & _FOV and flags & (_DPRY | _DCRT | _STPF | _IP):
        raise _wrong(1, (flags & 0x78).bit_length() - 1)
    if header == _LONG_HEADER_BYTES and data[3]:  # P_I_INFORMATION, PROTECTION INTERVAL EXPONENT
        raise _wrong(3)
    at = header - 4 if header == _LONG_HEADER_BYTES else 2
    if any(data[at:header]):  # DEFECT LIST LENGTH
        raise _wrong(at)
    pattern = _pattern(unit, data, header) if flags & _IP else b""
    return bool(flags & _IMMED), pattern


def _pattern(unit: "LogicalUnit", data: bytes, at: int) -> bytes:
    """The initialization pattern descriptor."""
    if len(data) < at + _PATTERN_HEADER_BYTES:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if data[at]:  # IP MODIFIER; SI: there are no blocks but those that can be addressed
        raise _wrong(at, data[at].bit_length() - 1)
    kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
    pattern = data[at + 4 : at + 4 + length]
    if len(pattern) < length:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if kind == _DEFAULT_PATTERN:
        if length:
            raise _wrong(at + 2)
        return bytes(1)
    if kind != _REPEATED_PATTERN:
        raise _wrong(at + 1)
    if not 0 < length <= unit.block_size:
        raise _wrong(at + 2)
    return pattern


def format_unit(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """FORMAT UNIT. With IMMED it is answered when it has been kept, else when it is done; nothing that
    happens to the command or its session stops it."""
    sanitize.check_idle(unit)  # another may have begun since this one was let in
    medium(unit, request)
    immediate, pattern = _parameters(unit, request) if request.cdb[1] & _FMTDATA else (False, b"")

    def begun(error: Exception | None) -> None:
        if error is not None:
            unit.complete(request, unit.check(CheckCondition(Sense.INTERNAL_TARGET_FAILURE)))
        elif immediate:
            unit.complete(request, GOOD)

    def ended(outcome: Outcome) -> None:
        if not immediate:
            unit.complete(request, outcome)

    plan = sanitize.Plan(sanitize.Action.FORMAT, unrestricted=False, pattern=pattern)
    sanitize.begin(unit, plan, begun, ended)
    return None
