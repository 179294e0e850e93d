"""Bodies of the SBC commands that move data: what a CDB means for the bytes of a medium.

Each command is up to three functions, named in its row of ``table.py``: ``prepare_…`` decodes the CDB
when the header arrives and checks range and limits; ``…_nowait`` does it on the event loop if that needs
no waiting, else answers None; the body proper runs on a worker and may wait.

Rules:

* Reserved bits, RD/WR/VRPROTECT (PROTECT=0, so those too), ANCHOR (ANC_SUP=0) and unsupported service
  actions are refused by the usage mask of the row; here are only the fields that have a meaning.
* A range is checked before its length: LBA OUT OF RANGE goes before INVALID FIELD IN CDB. Zero blocks is
  no error up to and including the LBA after the last ("shall not be considered an error").
* What a Data-In reply borrows (``read_nowait``) is never looked at; what is compared or combined comes from
  ``read`` or ``copy_nowait``, which is plain memory.
* A write answers GOOD when the medium has it, if FUA says so or WCE is off; else when the backend has it.
* The initiator may send less Data-Out than the CDB asks for: exactly what came is written, to the byte.

Source: SBC-3 r36 §5.
"""

from collections.abc import Callable, Iterator
from struct import Struct
from typing import TYPE_CHECKING

from protocol.enums import ScsiStatus
from protocol.scsi.limits import (
    COPY_CHUNK_BYTES,
    MAXIMUM_ATOMIC_BLOCKS,
    MAXIMUM_TRANSFER_BYTES,
    PREFETCH_BYTES,
    atomic_granularity_blocks,
    pieces,
)
from protocol.scsi.request import GOOD, Buffer, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense
from storage.base import Backend, Done

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "ABORTED",
    "after_synchronize_cache",
    "begin_read",
    "begin_synchronize_cache",
    "begin_write",
    "decode",
    "medium",
    "paced",
    "prefetch",
    "prefetch_nowait",
    "prepare_range",
    "prepare_rw",
    "prepare_rw6",
    "prepare_write_atomic",
    "read",
    "read_nowait",
    "received",
    "set_range",
    "set_rest",
    "synchronize_cache",
    "synchronize_cache_nowait",
    "wants_durable",
    "write",
    "write_atomic",
    "write_nowait",
]

ABORTED = Outcome(ScsiStatus.TASK_ABORTED)
"""What a long body ends with when it sees that its task is gone; nobody is told."""
CONDITION_MET = Outcome(ScsiStatus.CONDITION_MET)

FUA = 0x08 | 0x02
"""FUA, and FUA_NV, which asks for a cache that outlives power at least: NV_SUP is 0, so the medium it is."""
IMMED = 0x02
WRITE_6 = 0x0A

# Where a CDB has its LBA and its number of blocks, by CDB length:
# (unpacks byte 1, LBA and blocks; byte of the LBA; byte of the number).
_Layout = tuple[Callable[[Buffer], tuple[int, int, int]], int, int]
_CDB10: _Layout = Struct("!xBIxH7x").unpack, 2, 7  # CDBs come padded to 16 bytes
_CDB12: _Layout = Struct("!xBII6x").unpack, 2, 6
_CDB16: _Layout = Struct("!xBQIxx").unpack, 2, 10
_BY_GROUP: tuple[_Layout, ...] = (_CDB10, _CDB10, _CDB10, _CDB10, _CDB16, _CDB12)
"""By group code, the three high bits of the opcode (SPC-4 §4.3.2)."""

# READ and WRITE: the layout, and whether the blocks travel as Data-Out.
_READ_WRITE: dict[int, tuple[Callable[[Buffer], tuple[int, int, int]], bool, int, int]] = {
    opcode: (layout[0], out, layout[1], layout[2])
    for opcode, layout, out in (
        (0x28, _CDB10, False),
        (0x2A, _CDB10, True),
        (0xA8, _CDB12, False),
        (0xAA, _CDB12, True),
        (0x88, _CDB16, False),
        (0x8A, _CDB16, True),
        (0x8B, _CDB16, True),  # ORWRITE(16)
    )
}


def medium(unit: "LogicalUnit", request: Request) -> Backend:
    """The unit's backend, or MEDIUM NOT PRESENT: it may have gone since the command was let in. If another
    has come in its place the command was ended before that; looked at in this order, it never gets that."""
    backend = unit.backend
    if backend is None or request.aborted:
        raise CheckCondition(Sense.MEDIUM_NOT_PRESENT)
    return backend


def set_range(unit: "LogicalUnit", request: Request, lba: int, blocks: int, lba_at: int = 2) -> None:
    """Check a range of blocks and note it in the request, in bytes; ``lba_at``: where the CDB has the LBA."""
    if lba + blocks > unit.blocks:
        raise CheckCondition(Sense.LBA_OUT_OF_RANGE, field=lba_at)
    request.offset = lba * unit.block_size
    request.length = blocks * unit.block_size


def set_rest(unit: "LogicalUnit", request: Request, lba: int, blocks: int) -> None:
    """Like ``set_range``, where zero blocks mean all from ``lba`` to the last one."""
    set_range(unit, request, lba, blocks or max(0, unit.blocks - lba))


def paced(unit: "LogicalUnit", request: Request, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The range in pieces, (offset, length) of each, when I/O limits let the medium move it. On a worker.

    Ends early when the command has been aborted: ``request.aborted`` says so.
    """
    throttle = unit.throttle
    chunk = COPY_CHUNK_BYTES
    if throttle is not None:
        chunk = min(chunk, throttle.piece_bytes or chunk)
    for at, size in pieces(offset, length, chunk):
        if request.aborted or (throttle is not None and not throttle.spend(size, lambda: request.aborted)):
            return
        yield at, size


def decode(cdb: bytes) -> tuple[int, int, int, int]:
    """Byte 1, LBA, number of blocks, and the byte of that number, of a 10, 12 or 16 byte CDB."""
    unpack, _, blocks_at = _BY_GROUP[cdb[0] >> 5]
    return (*unpack(cdb[:16]), blocks_at)


# -- READ and WRITE (SBC-3 §5.11 to 5.14, §5.32 to 5.35) --------------------------------------------


def prepare_rw(unit: "LogicalUnit", request: Request) -> None:
    """READ and WRITE (10), (12), (16), and ORWRITE(16)."""
    cdb = request.cdb
    unpack, out, lba_at, blocks_at = _READ_WRITE[cdb[0]]
    _, lba, blocks = unpack(cdb if len(cdb) == 16 else cdb[:16])
    if lba + blocks > unit.blocks:
        raise CheckCondition(Sense.LBA_OUT_OF_RANGE, field=lba_at)
    block_size = unit.block_size
    request.offset = lba * block_size
    request.length = length = blocks * block_size
    if length > MAXIMUM_TRANSFER_BYTES:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=blocks_at)
    if out:
        request.transfer_length = length


def prepare_rw6(unit: "LogicalUnit", request: Request) -> None:
    """READ(6) and WRITE(6): 21 bits of LBA, and TRANSFER LENGTH 0 is 256 blocks (SBC-3 §5.11)."""
    cdb = request.cdb
    set_range(unit, request, int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256, lba_at=1)
    if cdb[0] == WRITE_6:
        request.transfer_length = request.length


def read_nowait(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """READ, if the bytes can be had without waiting; they may be borrowed."""
    backend = unit.backend
    if backend is None or not request.length:
        return read(unit, request)
    if request.touched:
        data = backend.copy_nowait(request.offset, request.length)
    else:
        data = backend.read_nowait(request.offset, request.length)
    return None if data is None else Outcome(ScsiStatus.GOOD, data)


def begin_read(unit: "LogicalUnit", request: Request, done: Done) -> bool:
    """READ, ended by the medium."""
    backend = unit.backend
    return backend is not None and backend.begin_read(request.offset, request.length, done)


def read(unit: "LogicalUnit", request: Request) -> Outcome:
    """READ. FUA needs nothing: what the backend returns is what the medium has or will have."""
    backend = medium(unit, request)
    if not request.length:
        return GOOD
    return Outcome(ScsiStatus.GOOD, backend.read(request.offset, request.length))


def received(request: Request, length: int) -> Buffer:
    """The Data-Out that counts: what came, but no more than ``length`` bytes."""
    data = request.data_out
    return data if len(data) <= length else memoryview(data)[:length]


def wants_durable(unit: "LogicalUnit", request: Request) -> bool:
    """FUA, or WCE off; WRITE(6) has no FUA, that bit is the LBA's there."""
    cdb = request.cdb
    return not unit.write_cache or bool(cdb[1] & FUA and cdb[0] != WRITE_6)


def write_nowait(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """WRITE into the cache, if that needs no waiting. What must be durable always waits."""
    cdb = request.cdb
    if not unit.write_cache or (cdb[1] & FUA and cdb[0] != WRITE_6):
        return None
    backend = unit.backend
    data = request.data_out
    length = request.length
    if backend is None or not length or not data:
        return write(unit, request)
    if len(data) > length:
        data = memoryview(data)[:length]
    return GOOD if backend.write_nowait(request.offset, data) else None


def begin_write(unit: "LogicalUnit", request: Request, done: Done) -> bool:
    """WRITE, ended by the medium: what must be durable, and what would have to wait for the cache."""
    backend = unit.backend
    data = received(request, request.length)
    return backend is not None and backend.begin_write(
        request.offset, data, done, durable=wants_durable(unit, request)
    )


def write(unit: "LogicalUnit", request: Request) -> Outcome:
    """WRITE: as much Data-Out as came, up to the transfer length."""
    backend = medium(unit, request)
    data = received(request, request.length)
    if len(data):
        backend.write(request.offset, data, durable=wants_durable(unit, request))
    return GOOD


def prepare_write_atomic(unit: "LogicalUnit", request: Request) -> None:
    """WRITE ATOMIC(16) (SBC-4 §5.48): whole physical blocks, up to MAXIMUM_ATOMIC_BLOCKS, no boundaries."""
    cdb = request.cdb
    lba = int.from_bytes(cdb[2:10], "big")
    blocks = int.from_bytes(cdb[12:14], "big")
    set_range(unit, request, lba, blocks)
    granularity = atomic_granularity_blocks(unit.config.physical_block_exponent) or 1
    if blocks > MAXIMUM_ATOMIC_BLOCKS or blocks % granularity:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=12)
    if lba % granularity:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2)
    if cdb[10] or cdb[11]:  # MAXIMUM ATOMIC BOUNDARY SIZE is 0
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=10)
    request.transfer_length = request.length


def write_atomic(unit: "LogicalUnit", request: Request) -> Outcome:
    """WRITE ATOMIC: all or nothing towards every other command, its row being exclusive.

    Unless all its data has come nothing is written, and it is durable before it answers. Against power loss
    in the middle it is as atomic as one write of the medium is.
    """
    if len(request.data_out) < request.length:
        raise CheckCondition(Sense.INVALID_INFORMATION_UNIT)
    if request.length:
        medium(unit, request).write(request.offset, received(request, request.length), durable=True)
    return GOOD


# -- caches (SBC-3 §5.8, §5.9, §5.26, §5.27) ---------------------------------------------------------


def prepare_range(unit: "LogicalUnit", request: Request) -> None:
    """PRE-FETCH(10), (16) and SYNCHRONIZE CACHE(10), (16): a range; zero blocks are all to the end."""
    _, lba, blocks, _ = decode(request.cdb)
    set_rest(unit, request, lba, blocks)


def _ignore(outcome: Outcome) -> None:
    """IMMED: the command has been answered."""


def synchronize_cache_nowait(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """With IMMED: begin, and answer."""
    if not request.length:
        return synchronize_cache(unit, request)
    if not request.cdb[1] & IMMED:
        if not request.offset and request.length == unit.blocks * unit.block_size:
            unit.begin_flush(request)
        return None
    backend = medium(unit, request)
    offset, length = request.offset, request.length

    def work() -> Outcome:
        try:
            backend.flush(offset, length)
        except OSError:
            pass  # the backend counts it among its lost writes, and everyone who wrote is told
        return GOOD

    unit.lane.flushes.run(work, lambda _: unit.note_lost_writes())
    return GOOD


def synchronize_cache(unit: "LogicalUnit", request: Request) -> Outcome:
    """SYNCHRONIZE CACHE: GOOD when the medium has all of the range."""
    backend = medium(unit, request)
    if request.length:
        backend.flush(request.offset, request.length)
    return GOOD


def begin_synchronize_cache(unit: "LogicalUnit", request: Request, done: Done) -> bool:
    """SYNCHRONIZE CACHE, ended by the medium."""
    backend = unit.backend
    return backend is not None and bool(request.length) and backend.begin_flush(done)


def after_synchronize_cache(unit: "LogicalUnit", request: Request, outcome: Outcome) -> None:
    """It counts for what its nexus had written before."""
    unit.end_flush(request, outcome)


def prefetch_nowait(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """With IMMED: begin, and answer; whether all of it will be there is known from its size."""
    if not request.cdb[1] & IMMED:
        return None
    medium(unit, request)

    def work() -> Outcome:
        try:
            return prefetch(unit, request)
        except (OSError, CheckCondition):
            return GOOD  # a READ of the same blocks will tell

    unit.lane.long.run(work, _ignore)
    return _prefetched(request)


def _prefetched(request: Request) -> Outcome:
    return CONDITION_MET if request.length <= PREFETCH_BYTES else GOOD


def prefetch(unit: "LogicalUnit", request: Request) -> Outcome:
    """PRE-FETCH: CONDITION MET when all of the range has been read, GOOD when only its beginning was."""
    backend = medium(unit, request)
    for offset, size in paced(unit, request, request.offset, min(request.length, PREFETCH_BYTES)):
        backend.read(offset, size)
    return ABORTED if request.aborted else _prefetched(request)
