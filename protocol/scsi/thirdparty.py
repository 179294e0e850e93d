"""EXTENDED COPY (LID1), RECEIVE COPY RESULTS and the Third-party Copy VPD page (8Fh).

Only what copy managers use: CSCD descriptor E4h (identification descriptor) and the segment descriptors 02h
and 0Ah (block to block, with and without byte offsets). The whole parameter list is checked before the first
byte moves. Token copies (ODX) are in ``odx.py``.

Source: SPC-4 r37 §6.4.3, §6.6, §6.18, §6.19, §7.8.17.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.enums import ScsiStatus
from protocol.scsi import odx
from protocol.scsi.copymanager import (
    Copy,
    Reach,
    Result,
    destination_backend,
    may_copy,
    reachable,
    results_of,
    run,
    source_backend,
    throttles_of,
    visible_units,
)
from protocol.scsi.odx import (
    populate_token,
    prepare_token_command,
    receive_rod_token_information,
    write_using_token,
)
from protocol.scsi.request import GOOD, Outcome, Request
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "extended_copy",
    "populate_token",
    "prepare_extended_copy",
    "prepare_token_command",
    "receive_copy_status",
    "receive_operating_parameters",
    "receive_rod_token_information",
    "third_party_copy_page",
    "write_using_token",
]

MAXIMUM_CSCD_DESCRIPTORS = 16
MAXIMUM_SEGMENT_DESCRIPTORS = 16
MAXIMUM_DESCRIPTOR_LIST_BYTES = 1008
"""More than either list at one over its maximum beside one of the other, less than both at one over: so each
limit can be told from the others."""
MAXIMUM_SEGMENT_BYTES = 64 * 2**20
"""MAXIMUM SEGMENT LENGTH: what a worker does in one time-out even where nothing can be offloaded."""
MAXIMUM_CONCURRENT_COPIES = 16

_HEADER_BYTES = 16
_CSCD_BYTES = 32
_IDENTIFICATION = 0xE4
_BLOCK_TO_BLOCK, _BLOCK_TO_BLOCK_OFFSET = 0x02, 0x0A
_SEGMENT_BYTES = {_BLOCK_TO_BLOCK: 28, _BLOCK_TO_BLOCK_OFFSET: 32}
_NUL = 0x20
_DC = 0x02
_EUI64, _NAA = 2, 3
_EXTENDED_COPY = 0x00
_NO_LIST_IDENTIFIER = 3
"""LIST ID USAGE 11b: the command is not to be asked about."""


def _wrong(sense: Sense, at: int) -> CheckCondition:
    return CheckCondition(sense, field=at, in_parameters=True)


# -- EXTENDED COPY (LID1) (SPC-4 §6.4.3) --------------------------------------------------------------


def prepare_extended_copy(unit: "LogicalUnit", request: Request) -> None:
    """PARAMETER LIST LENGTH: none is no error; what cannot hold a header is."""
    length = int.from_bytes(request.cdb[10:14], "big")
    if 0 < length < _HEADER_BYTES:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR, field=10)
    if length > _HEADER_BYTES + MAXIMUM_DESCRIPTOR_LIST_BYTES:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR, field=10)
    request.transfer_length = length


@dataclass(frozen=True, slots=True)
class _Segment:
    """A segment descriptor, decoded; ``at`` is where it is in the parameter list."""

    at: int
    source: int
    destination: int
    source_lba: int
    destination_lba: int
    blocks: int | None = None
    by_destination: bool = False
    length: int = 0
    source_byte: int = 0
    destination_byte: int = 0


def extended_copy(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """EXTENDED COPY (LID1); None: a worker has begun, and ``complete`` follows."""
    data = bytes(request.data_out[: request.transfer_length])
    if len(data) < request.transfer_length:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if not data:
        return GOOD
    descriptors, segments = _decode(data)
    list_identifier = data[0] if data[1] >> 3 & 3 != _NO_LIST_IDENTIFIER else None
    result = Result(_EXTENDED_COPY)
    if list_identifier is not None:
        result = results_of(unit).begin(unit, request.nexus, list_identifier, _EXTENDED_COPY)
    try:
        todo = [_resolve(unit, request, descriptors, segment) for segment in segments]
    except (CheckCondition, ReservationConflict) as error:
        result.outcome = unit.failed(request, error)
        raise
    result.segments = len(todo)
    run(unit, request, result, todo)
    return None


def _decode(data: bytes) -> tuple[list[bytes], list[_Segment]]:
    """CSCDs and segments of a parameter list: lengths are judged first, then counts, then kinds."""
    cscd_length = int.from_bytes(data[2:4], "big")
    segment_length = int.from_bytes(data[8:12], "big")
    inline_length = int.from_bytes(data[12:16], "big")
    if cscd_length + segment_length > MAXIMUM_DESCRIPTOR_LIST_BYTES:
        raise _wrong(Sense.PARAMETER_LIST_LENGTH_ERROR, 2)
    if inline_length:
        raise _wrong(Sense.INLINE_DATA_LENGTH_EXCEEDED, 12)
    if cscd_length % _CSCD_BYTES or _HEADER_BYTES + cscd_length + segment_length > len(data):
        raise _wrong(Sense.PARAMETER_LIST_LENGTH_ERROR, 2)
    if cscd_length // _CSCD_BYTES > MAXIMUM_CSCD_DESCRIPTORS:
        raise _wrong(Sense.TOO_MANY_TARGET_DESCRIPTORS, 2)
    first_segment = _HEADER_BYTES + cscd_length
    descriptors = [data[at : at + _CSCD_BYTES] for at in range(_HEADER_BYTES, first_segment, _CSCD_BYTES)]
    for index, descriptor in enumerate(descriptors):
        if descriptor[0] != _IDENTIFICATION:
            raise _wrong(Sense.UNSUPPORTED_TARGET_DESCRIPTOR_TYPE, _HEADER_BYTES + index * _CSCD_BYTES)
    segments: list[_Segment] = []
    at, end = first_segment, first_segment + segment_length
    while at < end:
        size = _SEGMENT_BYTES.get(data[at])
        if size is None:
            raise _wrong(Sense.UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE, at)
        if at + size > end:
            raise _wrong(Sense.PARAMETER_LIST_LENGTH_ERROR, 8)
        if int.from_bytes(data[at + 2 : at + 4], "big") != size - 4:
            raise _wrong(Sense.INVALID_FIELD_IN_PARAMETER_LIST, at + 2)
        if len(segments) == MAXIMUM_SEGMENT_DESCRIPTORS:
            raise _wrong(Sense.TOO_MANY_SEGMENT_DESCRIPTORS, 8)
        segments.append(_segment(data, at))
        at += size
    return descriptors, segments


def _segment(data: bytes, at: int) -> _Segment:
    """Segment descriptors 02h and 0Ah (SPC-4 §6.6.6.3, §6.6.6.12)."""

    def number(offset: int, length: int) -> int:
        return int.from_bytes(data[at + offset : at + offset + length], "big")

    source, destination = number(4, 2), number(6, 2)
    if data[at] == _BLOCK_TO_BLOCK:
        by_destination = bool(data[at + 1] & _DC)
        return _Segment(at, source, destination, number(12, 8), number(20, 8), number(10, 2), by_destination)
    return _Segment(
        at,
        source,
        destination,
        number(12, 8),
        number(20, 8),
        length=number(8, 4),
        source_byte=number(28, 2),
        destination_byte=number(30, 2),
    )


def _resolve(unit: "LogicalUnit", request: Request, descriptors: list[bytes], segment: _Segment) -> Copy:
    """What a segment copies, in bytes of media; COPY ABORTED if it cannot."""
    from_reach = _reach(unit, request, descriptors, segment.source, segment.at + 4)
    to_reach = _reach(unit, request, descriptors, segment.destination, segment.at + 6)
    if not may_copy(from_reach, to_reach):
        at = segment.at + (4 if from_reach.foreign else 6)
        raise CheckCondition(Sense.UNREACHABLE_COPY_TARGET, field=at, in_segment=True)
    source, destination = from_reach.unit, to_reach.unit
    length = segment.length
    if segment.blocks is not None:
        length = segment.blocks * (destination if segment.by_destination else source).block_size
    if length > MAXIMUM_SEGMENT_BYTES:
        raise _wrong(Sense.INVALID_FIELD_IN_PARAMETER_LIST, segment.at + 8)
    source_offset = segment.source_lba * source.block_size + segment.source_byte
    offset = segment.destination_lba * destination.block_size + segment.destination_byte
    for which, begin, at in ((source, source_offset, 12), (destination, offset, 20)):
        if begin + length > which.blocks * which.block_size:
            raise CheckCondition(Sense.COPY_ABORTED_NO_ADDITIONAL_SENSE, field=at, in_segment=True)
    return Copy(
        source_backend(from_reach, request),
        source_offset,
        to_reach,
        destination_backend(to_reach, request),
        offset,
        length,
        durable=to_reach.durable,
        throttles=throttles_of(source, destination),
    )


def _reach(unit: "LogicalUnit", request: Request, descriptors: list[bytes], index: int, at: int) -> Reach:
    """The logical unit of a CSCD descriptor, among those that the nexus may name."""
    if index >= len(descriptors):
        raise CheckCondition(Sense.UNREACHABLE_COPY_TARGET, field=at, in_segment=True)
    descriptor = descriptors[index]
    if descriptor[1] & _NUL:
        raise CheckCondition(Sense.COPY_TARGET_DEVICE_NOT_REACHABLE, field=at, in_segment=True)
    if descriptor[1] & 0x1F:
        raise CheckCondition(Sense.INCORRECT_COPY_TARGET_DEVICE_TYPE, field=at, in_segment=True)
    kind, length = descriptor[5] & 0x0F, descriptor[7]
    designator = descriptor[8 : 8 + min(length, 20)]
    for candidate in visible_units(unit, request.nexus):
        if designator and designator in _designators(candidate, kind):
            return Reach(candidate, request.nexus)
    if kind == _NAA and designator:
        for reach in reachable(unit, request.nexus, "0x" + designator.hex()):
            return reach
    raise CheckCondition(Sense.UNREACHABLE_COPY_TARGET, field=at, in_segment=True)


def _designators(unit: "LogicalUnit", kind: int) -> list[bytes]:
    """What the unit is called in VPD page 83h, by designator type; only what fits 20 bytes."""
    if kind == _NAA and unit.config.naa:
        return [bytes.fromhex(unit.config.naa.removeprefix("0x"))]
    if kind == _EUI64 and unit.config.eui64:
        return [unit.config.eui64]
    return []


# -- RECEIVE COPY RESULTS (SPC-4 §6.18, §6.19) ---------------------------------------------------------


def _cut(request: Request, body: bytes) -> Outcome:
    """AVAILABLE DATA, which counts what follows it, and the body, to the allocation length."""
    data = len(body).to_bytes(4, "big") + body
    return Outcome(data_in=data[: int.from_bytes(request.cdb[10:14], "big")])


def receive_copy_status(unit: "LogicalUnit", request: Request) -> Outcome:
    """COPY STATUS (LID1): 0 under way, 1 done, 2 done with errors."""
    result = results_of(unit).find(request.nexus, request.cdb[2], _EXTENDED_COPY)
    if result is None:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2)
    status = 0
    if result.outcome is not None:
        status = 1 if result.outcome.status == ScsiStatus.GOOD else 2
    body = bytes((status,)) + result.segments.to_bytes(2, "big")
    return _cut(request, body + b"\x00" + min(result.transferred, 0xFFFFFFFF).to_bytes(4, "big"))


_KINDS = bytes((_BLOCK_TO_BLOCK, _BLOCK_TO_BLOCK_OFFSET, _IDENTIFICATION))


def receive_operating_parameters(unit: "LogicalUnit", request: Request) -> Outcome:
    """OPERATING PARAMETERS: no inline data, no held data, any granularity, no stream devices."""
    body = bytearray(40)  # bytes 4 to 43 of the parameter data
    body[0] = 0x01  # SNLID: LIST ID USAGE 11b is supported
    body[4:6] = MAXIMUM_CSCD_DESCRIPTORS.to_bytes(2, "big")
    body[6:8] = MAXIMUM_SEGMENT_DESCRIPTORS.to_bytes(2, "big")
    body[8:12] = MAXIMUM_DESCRIPTOR_LIST_BYTES.to_bytes(4, "big")
    body[12:16] = MAXIMUM_SEGMENT_BYTES.to_bytes(4, "big")
    body[30:32] = MAXIMUM_CONCURRENT_COPIES.to_bytes(2, "big")
    body[32] = MAXIMUM_CONCURRENT_COPIES
    body[39] = len(_KINDS)
    return _cut(request, bytes(body) + _KINDS)


# -- VPD page 8Fh (SPC-4 §7.8.17) -----------------------------------------------------------------------

_COMMANDS = ((0x83, (0x00, 0x10, 0x11)), (0x84, (0x00, 0x03, 0x07)))


def _supported_commands(unit: "LogicalUnit") -> bytes:
    body = b"".join(bytes((opcode, len(actions), *actions)) for opcode, actions in _COMMANDS)
    return bytes((len(body),)) + body


def _parameter_data(unit: "LogicalUnit") -> bytes:
    return (
        bytes(4)
        + MAXIMUM_CSCD_DESCRIPTORS.to_bytes(2, "big")
        + MAXIMUM_SEGMENT_DESCRIPTORS.to_bytes(2, "big")
        + MAXIMUM_DESCRIPTOR_LIST_BYTES.to_bytes(4, "big")
        + bytes(16)
    )


def _supported_descriptors(unit: "LogicalUnit") -> bytes:
    return bytes((len(_KINDS),)) + _KINDS


def _general_copy_operations(unit: "LogicalUnit") -> bytes:
    return (
        MAXIMUM_CONCURRENT_COPIES.to_bytes(4, "big") * 2
        + MAXIMUM_SEGMENT_BYTES.to_bytes(4, "big")
        + bytes(20)
    )


_DESCRIPTORS: "tuple[tuple[int, Callable[[LogicalUnit], bytes]], ...]" = (
    (0x0000, odx.block_device_rod_limits),
    (0x0001, _supported_commands),
    (0x0004, _parameter_data),
    (0x0008, _supported_descriptors),
    (0x0106, odx.rod_token_features),
    (0x0108, odx.supported_rod_types),
    (0x8001, _general_copy_operations),
)


def third_party_copy_page(unit: "LogicalUnit") -> bytes:
    """The third-party copy descriptors, without the page header; each padded to a multiple of four."""
    page = b""
    for kind, build in _DESCRIPTORS:
        body = build(unit)
        body += bytes(-len(body) % 4)
        page += kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body
    return page
