"""Bodies of the SBC commands about blocks as such: giving them back, filling them, asking what they are.

The rules are those of ``block.py``. UNMAP and WRITE SAME with UNMAP leave to the backend what is smaller than
its granularity: it zeroes that, so that with LBPRZ=1 every block given back reads as zeros at once.

Source: SBC-3 r36 §4.7, §5.
"""

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING

from protocol.scsi.block import ABORTED, decode, medium, paced, received, set_range, set_rest
from protocol.scsi.limits import (
    COPY_CHUNK_BYTES,
    LBA_STATUS_DESCRIPTORS,
    LIMITED_SPACE_CHUNK_BYTES,
    MAXIMUM_UNMAP_BLOCKS,
    MAXIMUM_UNMAP_DESCRIPTORS,
    MAXIMUM_WRITE_SAME_BLOCKS,
    SPACE_CHUNK_BYTES,
    pieces,
)
from protocol.scsi.request import GOOD, Buffer, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense
from storage.base import Backend

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "get_lba_status",
    "prepare_get_lba_status",
    "prepare_unmap",
    "prepare_write_same",
    "read_capacity10",
    "read_capacity16",
    "read_defect_data10",
    "read_defect_data12",
    "unmap",
    "write_same",
]

UNMAP = 0x08
NDOB = 0x01


# -- WRITE SAME, UNMAP (SBC-3 §5.28, §5.40, §5.41) ---------------------------------------------------


def prepare_write_same(unit: "LogicalUnit", request: Request) -> None:
    """WRITE SAME(10) and (16): zero blocks are all to the end (WSNZ=0), if that is not too many.

    One block of Data-Out or, with NDOB, none. Data-Out of another size is refused: there is nothing it
    could mean.
    """
    cdb = request.cdb
    flags, lba, blocks, blocks_at = decode(cdb)
    set_rest(unit, request, lba, blocks)
    if request.length > MAXIMUM_WRITE_SAME_BLOCKS * unit.block_size:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=blocks_at)
    if flags & UNMAP and not unit.thin:  # LBPWS and LBPWS10 are 0
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=3)
    if not flags & NDOB:
        request.transfer_length = unit.block_size
        if request.expected_out != unit.block_size:
            raise CheckCondition(Sense.INVALID_INFORMATION_UNIT)


def write_same(unit: "LogicalUnit", request: Request) -> Outcome:
    """WRITE SAME. With UNMAP the blocks are given back and read as zeros, whatever the Data-Out holds.

    SBC-3 §4.7.3.4.4 would have a pattern other than zeros written; no initiator sends one with UNMAP, other
    targets give the blocks back, and libiscsi's suite expects just that.
    """
    backend = medium(unit, request)
    flags = request.cdb[1]
    pattern = b""
    if not flags & NDOB:
        pattern = bytes(received(request, unit.block_size))
        if len(pattern) < unit.block_size:
            raise CheckCondition(Sense.INVALID_INFORMATION_UNIT)
    give_back = flags & UNMAP and backend.capabilities.unmap_reads_zero
    if flags & UNMAP or not any(pattern):
        clear = backend.unmap if give_back else backend.write_zeroes
        clear_range(unit, request, backend, clear, request.offset, request.length)
    else:
        _fill(unit, backend, request, pattern)
    if request.aborted:
        return ABORTED
    if not unit.write_cache and request.length:
        backend.flush(request.offset, request.length)
    return GOOD


def clear_range(
    unit: "LogicalUnit",
    request: Request,
    backend: Backend,
    clear: Callable[[int, int], None],
    offset: int,
    length: int,
) -> None:
    """``clear`` a range in pieces, until aborted. I/O limits count what the medium had there."""
    throttle = unit.throttle
    limited = throttle is not None and throttle.piece_bytes
    for at, size in pieces(offset, length, LIMITED_SPACE_CHUNK_BYTES if limited else SPACE_CHUNK_BYTES):
        if request.aborted:
            return
        if throttle is not None and not throttle.spend(allocated(backend, at, size), lambda: request.aborted):
            return
        clear(at, size)


def allocated(backend: Backend, offset: int, length: int) -> int:
    """Bytes of a range that the medium has blocks for, as far as it can tell."""
    if not backend.capabilities.map_query:
        return length
    return sum(run.length for run in backend.runs(offset, length) if run.mapped)


def _fill(unit: "LogicalUnit", backend: Backend, request: Request, pattern: bytes) -> None:
    """Write a block over and over, until aborted."""
    data = memoryview(pattern * max(1, min(COPY_CHUNK_BYTES, request.length) // len(pattern)))
    for at, size in paced(unit, request, request.offset, request.length):
        backend.write(at, data[:size])


_UNMAP_HEADER_BYTES = 8
_UNMAP_DESCRIPTOR = Struct("!QI4x")


def prepare_unmap(unit: "LogicalUnit", request: Request) -> None:
    """UNMAP: only the parameter list tells the ranges, so it counts for all of the medium."""
    length = int.from_bytes(request.cdb[7:9], "big")
    if 0 < length < _UNMAP_HEADER_BYTES:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR, field=7)
    request.transfer_length = length
    set_range(unit, request, 0, unit.blocks)


def unmap_ranges(unit: "LogicalUnit", parameters: Buffer) -> list[tuple[int, int]]:
    """The ranges of an UNMAP parameter list (SBC-3 §5.28.2) in bytes: sorted, merged, none empty.

    All descriptors are checked before the first is acted on. Merging lets neighbours that are each too
    small for the unmap granularity be given back together. Truncated descriptors are ignored.
    """
    parameters = bytes(parameters)
    if not parameters:
        return []
    if len(parameters) < _UNMAP_HEADER_BYTES:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    listed = min(int.from_bytes(parameters[2:4], "big"), len(parameters) - _UNMAP_HEADER_BYTES)
    count = listed // _UNMAP_DESCRIPTOR.size
    if count > MAXIMUM_UNMAP_DESCRIPTORS:
        raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=2, in_parameters=True)
    ranges = []
    total = 0
    for index in range(count):
        at = _UNMAP_HEADER_BYTES + index * _UNMAP_DESCRIPTOR.size
        lba, blocks = _UNMAP_DESCRIPTOR.unpack_from(parameters, at)
        if lba + blocks > unit.blocks:
            raise CheckCondition(Sense.LBA_OUT_OF_RANGE, field=at, in_parameters=True)
        total += blocks
        if total > MAXIMUM_UNMAP_BLOCKS:
            raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=at + 8, in_parameters=True)
        if blocks:
            ranges.append((lba * unit.block_size, blocks * unit.block_size))
    ranges.sort()
    merged: list[tuple[int, int]] = []
    for offset, length in ranges:
        if merged and offset <= sum(merged[-1]):
            before, size = merged[-1]
            merged[-1] = before, max(size, offset + length - before)
        else:
            merged.append((offset, length))
    return merged


def unmap(unit: "LogicalUnit", request: Request) -> Outcome:
    """UNMAP. Pieces below the unmap granularity are zeroed by the backend, not given back (LBPRZ=1)."""
    backend = medium(unit, request)
    ranges = unmap_ranges(unit, received(request, request.transfer_length))
    for offset, length in ranges:
        clear_range(unit, request, backend, backend.unmap, offset, length)
        if request.aborted:
            return ABORTED
    if ranges and not unit.write_cache:
        backend.flush()
    return GOOD


# -- what the medium is like (SBC-3 §5.5, §5.15 to 5.18) ---------------------------------------------


def prepare_get_lba_status(unit: "LogicalUnit", request: Request) -> None:
    """GET LBA STATUS: from an LBA that exists, as far as it goes."""
    lba = int.from_bytes(request.cdb[2:10], "big")
    if lba >= unit.blocks:
        raise CheckCondition(Sense.LBA_OUT_OF_RANGE, field=2)
    set_range(unit, request, lba, unit.blocks - lba)


_MAPPED, _DEALLOCATED = 0, 1
_STATUS_DESCRIPTOR = Struct("!QIB3x")


def get_lba_status(unit: "LogicalUnit", request: Request) -> Outcome:
    """GET LBA STATUS: runs of blocks of one state, neighbours never of the same one.

    A block is mapped if any byte of it is. Without a truthful map everything is mapped (SBC-3 §4.7.2).
    """
    backend = medium(unit, request)
    allocation = int.from_bytes(request.cdb[10:14], "big")
    wanted = min(LBA_STATUS_DESCRIPTORS, max(1, (allocation - 8) // _STATUS_DESCRIPTOR.size))
    block_size = unit.block_size
    states: list[list[int]] = []  # [first block, block after the last, state]
    if unit.thin and backend.capabilities.map_query:
        for run in backend.runs(request.offset, request.length):
            if request.aborted:
                return ABORTED
            end = run.offset + run.length
            if run.mapped:
                first, last, state = run.offset // block_size, -(-end // block_size), _MAPPED
            else:
                first, last, state = -(-run.offset // block_size), end // block_size, _DEALLOCATED
            if states:
                first = max(first, states[-1][1])
            if first >= last:
                continue
            if states and states[-1][2] == state:
                states[-1][1] = last
            elif len(states) == wanted:
                break
            else:
                states.append([first, last, state])
    else:
        states.append([request.offset // block_size, unit.blocks, _MAPPED])
    descriptors = bytearray()
    for first, last, state in states:
        for at, blocks in _split(first, last):
            descriptors += _STATUS_DESCRIPTOR.pack(at, blocks, state)
    length = 4 + len(descriptors)
    return Outcome(data_in=(length.to_bytes(4, "big") + bytes(4) + descriptors)[:allocation])


def _split(first: int, last: int) -> list[tuple[int, int]]:
    """A run in descriptors of 32 bit counts."""
    most = 0xFFFFFFFF
    return [(at, min(most, last - at)) for at in range(first, last, most)]


def read_capacity10(unit: "LogicalUnit", request: Request) -> Outcome:
    """READ CAPACITY(10): FFFFFFFFh says that READ CAPACITY(16) knows."""
    medium(unit, request)
    last = min(unit.blocks - 1, 0xFFFFFFFF)
    return Outcome(data_in=max(0, last).to_bytes(4, "big") + unit.block_size.to_bytes(4, "big"))


_LBPME, _LBPRZ = 0x80, 0x40


def read_capacity16(unit: "LogicalUnit", request: Request) -> Outcome:
    """READ CAPACITY(16): no protection; LBPPBE and LBPME, LBPRZ as they are; LOWEST ALIGNED LBA 0."""
    backend = medium(unit, request)
    data = bytearray(32)
    data[0:8] = max(0, unit.blocks - 1).to_bytes(8, "big")
    data[8:12] = unit.block_size.to_bytes(4, "big")
    data[13] = unit.config.physical_block_exponent
    if unit.thin:
        data[14] = _LBPME | (_LBPRZ if backend.capabilities.unmap_reads_zero else 0)
    return Outcome(data_in=bytes(data[: int.from_bytes(request.cdb[10:14], "big")]))


def read_defect_data10(unit: "LogicalUnit", request: Request) -> Outcome:
    """READ DEFECT DATA(10): the lists asked for are there and empty, in the format asked for."""
    cdb = request.cdb
    data = bytes((0, cdb[2] & 0x1F, 0, 0))
    return Outcome(data_in=data[: int.from_bytes(cdb[7:9], "big")])


def read_defect_data12(unit: "LogicalUnit", request: Request) -> Outcome:
    """READ DEFECT DATA(12): likewise, with a longer header and a generation that never changes."""
    cdb = request.cdb
    data = bytes((0, cdb[1] & 0x1F)) + bytes(6)
    return Outcome(data_in=data[: int.from_bytes(cdb[6:10], "big")])
