"""Bodies of the SBC commands that compare with the medium, or combine with what it has.

The rules are those of ``block.py``. What is compared comes from ``read`` or ``copy_nowait``, which is plain
memory, never from a window on mapped memory.

Source: SBC-3 r36 §5.
"""

from typing import TYPE_CHECKING

from protocol.scsi.block import ABORTED, decode, medium, paced, received, set_range, wants_durable
from protocol.scsi.limits import (
    COPY_CHUNK_BYTES,
    MAXIMUM_COMPARE_AND_WRITE_BLOCKS,
    MAXIMUM_TRANSFER_BYTES,
    pieces,
)
from protocol.scsi.request import GOOD, Buffer, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense
from storage.base import Backend, Run

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "compare_and_write",
    "compare_and_write_nowait",
    "orwrite",
    "prepare_compare_and_write",
    "prepare_verify",
    "prepare_write_and_verify",
    "verify",
    "write_and_verify",
]

# -- VERIFY, WRITE AND VERIFY (SBC-3 §5.29 to 5.31, §5.36 to 5.38) -----------------------------------

COMPARED_BYTES = 65536
"""Compared or combined at once."""

_COMPARE_NONE, _COMPARE_ALL, _COMPARE_ONE_BLOCK = 0, 1, 3


def _byte_check(cdb: bytes) -> int:
    """BYTCHK."""
    return cdb[1] >> 1 & 3


def prepare_verify(unit: "LogicalUnit", request: Request) -> None:
    """VERIFY(10), (12), (16). BYTCHK 00b takes no Data-Out: if some is sent all the same, it is ignored."""
    _, lba, blocks, blocks_at = decode(request.cdb)
    set_range(unit, request, lba, blocks)
    if request.length > MAXIMUM_TRANSFER_BYTES:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=blocks_at)
    check = _byte_check(request.cdb)
    if check == _COMPARE_ALL:
        request.transfer_length = request.length
    elif check == _COMPARE_ONE_BLOCK:
        request.transfer_length = min(unit.block_size, request.length)
    elif check != _COMPARE_NONE:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=2)


def verify(unit: "LogicalUnit", request: Request) -> Outcome:
    """VERIFY: see whether the range can be read, or compare it as BYTCHK says; a difference is MISCOMPARE."""
    backend = medium(unit, request)
    check = _byte_check(request.cdb)
    if check == _COMPARE_NONE:
        return _look_through(unit, backend, request)
    data = memoryview(received(request, request.transfer_length))
    if check == _COMPARE_ONE_BLOCK:
        if len(data) < request.transfer_length:
            raise CheckCondition(Sense.INVALID_INFORMATION_UNIT)
        return _compare_one_block(unit, backend, request, bytes(data))
    for offset, size in paced(unit, request, request.offset, min(request.length, len(data))):
        at = offset - request.offset
        if not equal(backend.read(offset, size), data[at : at + size]):
            raise CheckCondition(Sense.MISCOMPARE_DURING_VERIFY)
    return ABORTED if request.aborted else GOOD


def _look_through(unit: "LogicalUnit", backend: Backend, request: Request) -> Outcome:
    """BYTCHK 00b: what is a hole or in memory can be had, and only the rest is read to see whether it can."""
    runs = backend.runs(request.offset, request.length) if backend.capabilities.map_query else None
    for run in runs or (Run(request.offset, request.length, True),):
        if not run.mapped:
            continue
        for offset, size in paced(unit, request, run.offset, run.length):
            if backend.read_nowait(offset, size) is None:
                backend.read(offset, size)
    return ABORTED if request.aborted else GOOD


def _compare_one_block(unit: "LogicalUnit", backend: Backend, request: Request, block: bytes) -> Outcome:
    """BYTCHK 11b: every block of the range equals the one sent."""
    if not block:
        return GOOD
    pattern = memoryview(block * max(1, COPY_CHUNK_BYTES // len(block)))
    for offset, size in paced(unit, request, request.offset, request.length):
        if not equal(backend.read(offset, size), pattern[:size]):
            raise CheckCondition(Sense.MISCOMPARE_DURING_VERIFY)
    return ABORTED if request.aborted else GOOD


def equal(one: Buffer, other: Buffer) -> bool:
    """Whether two buffers hold the same, by memcmp(3), in pieces that hold the interpreter's lock for some
    microseconds each. (Memoryviews compare themselves item by item, a thousand times as slowly.)"""
    if len(one) != len(other):
        return False
    with memoryview(one) as a, memoryview(other) as b:
        return all(
            bytes(a[at : at + COMPARED_BYTES]) == bytes(b[at : at + COMPARED_BYTES])
            for at in range(0, len(a), COMPARED_BYTES)
        )


def prepare_write_and_verify(unit: "LogicalUnit", request: Request) -> None:
    """WRITE AND VERIFY(10), (12), (16); BYTCHK 0 or 1."""
    _, lba, blocks, blocks_at = decode(request.cdb)
    set_range(unit, request, lba, blocks)
    if _byte_check(request.cdb) not in (_COMPARE_NONE, _COMPARE_ALL):
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=2)
    if request.length > MAXIMUM_TRANSFER_BYTES:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=blocks_at)
    request.transfer_length = request.length


def write_and_verify(unit: "LogicalUnit", request: Request) -> Outcome:
    """WRITE AND VERIFY: to the medium whatever WCE says, then read again, and compared with BYTCHK 1."""
    backend = medium(unit, request)
    data = memoryview(received(request, request.length))
    if not len(data):
        return GOOD
    backend.write(request.offset, data, durable=True)
    back = backend.read(request.offset, len(data))
    if _byte_check(request.cdb) == _COMPARE_ALL and not equal(back, data):
        raise CheckCondition(Sense.MISCOMPARE_DURING_VERIFY)
    return GOOD


# -- COMPARE AND WRITE, ORWRITE (SBC-3 §5.2, §5.7) ---------------------------------------------------


def prepare_compare_and_write(unit: "LogicalUnit", request: Request) -> None:
    """COMPARE AND WRITE: twice its blocks of Data-Out, what is expected and what to write."""
    cdb = request.cdb
    blocks = cdb[13]
    set_range(unit, request, int.from_bytes(cdb[2:10], "big"), blocks)
    if blocks > MAXIMUM_COMPARE_AND_WRITE_BLOCKS:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=13)
    request.transfer_length = 2 * request.length
    if request.expected_out != request.transfer_length:  # 256 blocks look like 0: the CDB is what is wrong
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=13)


def first_difference(one: Buffer, other: Buffer) -> int | None:
    """Offset of the first byte in which two buffers of equal length differ."""
    one, other = memoryview(one), memoryview(other)
    low, high = 0, len(one)
    if equal(one, other):
        return None
    while high - low > 1:  # it is in one[low:high]
        middle = (low + high) // 2
        if equal(one[low:middle], other[low:middle]):
            low = middle
        else:
            high = middle
    return low


def _expect(request: Request, found: Buffer) -> Buffer:
    """Compare the first half of the Data-Out with the medium; the second half is what to write."""
    length = request.length
    data = memoryview(request.data_out)
    difference = first_difference(found, data[:length])
    if difference is not None:
        raise CheckCondition(Sense.MISCOMPARE_DURING_VERIFY, information=difference)
    return data[length : 2 * length]


def compare_and_write_nowait(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """COMPARE AND WRITE, if neither half needs waiting."""
    backend = unit.backend
    if backend is None or not request.length or wants_durable(unit, request):
        return None
    found = backend.copy_nowait(request.offset, request.length)
    if found is None or len(request.data_out) < 2 * request.length:
        return None
    return GOOD if backend.write_nowait(request.offset, _expect(request, found)) else None


def compare_and_write(unit: "LogicalUnit", request: Request) -> Outcome:
    """COMPARE AND WRITE: its row is exclusive, so nothing comes between the compare and the write."""
    backend = medium(unit, request)
    if not request.length:
        return GOOD
    if len(request.data_out) < 2 * request.length:
        raise CheckCondition(Sense.INVALID_INFORMATION_UNIT)
    data = _expect(request, backend.read(request.offset, request.length))
    backend.write(request.offset, data, durable=wants_durable(unit, request))
    return GOOD


def orwrite(unit: "LogicalUnit", request: Request) -> Outcome:
    """ORWRITE(16): the medium becomes itself or the Data-Out, bit by bit; the row is exclusive."""
    backend = medium(unit, request)
    data = memoryview(received(request, request.length))
    durable = wants_durable(unit, request)
    for offset, size in pieces(request.offset, len(data), COPY_CHUNK_BYTES):
        if request.aborted:
            return ABORTED
        at = offset - request.offset
        backend.write(offset, _combined(backend.read(offset, size), data[at : at + size]), durable=durable)
    return GOOD


def _combined(one: Buffer, other: Buffer) -> bytes:
    """One or the other, bit by bit; in pieces, for numbers hold the interpreter's lock."""
    parts = []
    for at in range(0, len(one), COMPARED_BYTES):
        bits = int.from_bytes(one[at : at + COMPARED_BYTES], "little")
        bits |= int.from_bytes(other[at : at + COMPARED_BYTES], "little")
        parts.append(bits.to_bytes(min(COMPARED_BYTES, len(one) - at), "little"))
    return b"".join(parts)
