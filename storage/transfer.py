"""Moving bytes between backends in pieces, and arithmetic on ranges. Knows no medium."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator

from storage.base import Backend, Run

__all__ = [
    "PIECE",
    "ZEROS",
    "copy_buffered",
    "copy_by_runs",
    "merged",
    "overlaps",
    "short_io",
    "split_aligned",
    "zero_buffered",
]

PIECE = 1 << 20
"""Bytes moved at a time: large enough that the calls cost nothing beside the copying, small enough that
a worker's memory stays bounded and an abort between pieces comes soon."""

ZEROS = bytes(PIECE)


def merged(runs: Iterable[Run]) -> Iterator[Run]:
    """The same runs with neighbours of one kind made one, so that data and hole alternate."""
    held: Run | None = None
    for run in runs:
        if held is None:
            held = run
        elif held.mapped == run.mapped:
            held = Run(held.offset, held.length + run.length, held.mapped)
        else:
            yield held
            held = run
    if held is not None:
        yield held


def split_aligned(offset: int, length: int, granularity: int) -> tuple[int, int]:
    """``(start, stop)`` of the whole granules inside the range; equal where there is none."""
    start = -(-offset // granularity) * granularity
    stop = (offset + length) // granularity * granularity
    return (start, stop) if start < stop else (offset, offset)


def zero_buffered(backend: Backend, offset: int, length: int) -> None:
    """Write zeros over the range."""
    for at in range(offset, offset + length, PIECE):
        count = min(PIECE, offset + length - at)
        backend.write(at, ZEROS if count == PIECE else ZEROS[:count])


def copy_buffered(
    destination: Backend, source: Backend, source_offset: int, offset: int, length: int
) -> None:
    """Copy through this process. Ranges of one backend may overlap: it goes in the direction that is safe."""
    steps: Iterable[int] = range(0, length, PIECE)
    if destination is source and source_offset < offset:
        steps = reversed(range(0, length, PIECE))
    for at in steps:
        count = min(PIECE, length - at)
        destination.write(offset + at, source.read(source_offset + at, count))


Copier = Callable[[Backend, Backend, int, int, int], None]
"""``copy_buffered`` or an equivalent."""


def copy_by_runs(
    destination: Backend,
    source: Backend,
    source_offset: int,
    offset: int,
    length: int,
    copy: Copier = copy_buffered,
) -> None:
    """Copy data by ``copy`` and leave the source's holes holes where the destination can have them.

    The ranges must not overlap. Where a hole cannot be made, zeros are written.
    """
    if not source.capabilities.map_query:
        copy(destination, source, source_offset, offset, length)
        return
    sparse = destination.capabilities.unmap and destination.capabilities.unmap_reads_zero
    for run in source.runs(source_offset, length):
        at = offset + run.offset - source_offset
        if run.mapped:
            copy(destination, source, run.offset, at, run.length)
        elif sparse:
            destination.unmap(at, run.length)
        else:
            destination.write_zeroes(at, run.length)


def overlaps(first: int, second: int, length: int) -> bool:
    """Whether two ranges of ``length`` bytes of one medium have bytes in common."""
    return abs(first - second) < length


def short_io(what: str, path: str) -> OSError:
    """The error for a transfer that stopped before its end without one of its own."""
    return OSError(errno.EIO, f"{what}: {os.strerror(errno.EIO)}", path)
