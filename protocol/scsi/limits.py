"""How much one block command may ask for. Block Limits (VPD page B0h) and the checks read the same names.

Blocks are logical blocks. A limit in bytes is turned into blocks by the unit's block size, so that it
guards the same amount of memory or time whatever the block size is.
"""

from collections.abc import Iterator

__all__ = [
    "COPY_CHUNK_BYTES",
    "LBA_STATUS_DESCRIPTORS",
    "LIMITED_SPACE_CHUNK_BYTES",
    "MAXIMUM_ATOMIC_BLOCKS",
    "MAXIMUM_COMPARE_AND_WRITE_BLOCKS",
    "MAXIMUM_TRANSFER_BYTES",
    "MAXIMUM_UNMAP_BLOCKS",
    "MAXIMUM_UNMAP_DESCRIPTORS",
    "MAXIMUM_WRITE_SAME_BLOCKS",
    "MAX_LINGERING_TASKS",
    "OPTIMAL_TRANSFER_BYTES",
    "PREFETCH_BYTES",
    "SPACE_CHUNK_BYTES",
    "atomic_granularity_blocks",
    "maximum_transfer_blocks",
    "pieces",
]

MAXIMUM_TRANSFER_BYTES = 32 * 2**20
"""MAXIMUM TRANSFER LENGTH. One command may hold this much memory, and ``protocol.limits.MAX_IN_FLIGHT`` says
what all of a connection may; initiators split what is longer by themselves. Linux asks for 1280 KiB, Windows
for 8 MiB; libiscsi's suite writes what MAXIMUM WRITE SAME LENGTH allows in one go. It holds for VERIFY too,
whatever BYTCHK says: the medium has to move as much."""

OPTIMAL_TRANSFER_BYTES = 2**20
"""OPTIMAL TRANSFER LENGTH: beyond it a longer command saves nothing any more."""

MAXIMUM_COMPARE_AND_WRITE_BLOCKS = 1
"""MAXIMUM COMPARE AND WRITE LENGTH. Locks on disk (VMware ATS) are one block."""

MAXIMUM_ATOMIC_BLOCKS = 256
"""MAXIMUM ATOMIC TRANSFER LENGTH: the least promise that is of use; MAXIMUM ATOMIC BOUNDARY SIZE is 0."""

MAX_LINGERING_TASKS = 256
"""Aborted tasks of a unit that a stuck medium does not give back. Each keeps its data, up to a first burst,
and no session's window counts it any more; beyond this many the unit takes nothing that may wait for the
medium (TASK SET FULL, SAM-5 §5.3.1), or whoever aborts and asks again would fill the memory."""

MAXIMUM_WRITE_SAME_BLOCKS = 65536
"""MAXIMUM WRITE SAME LENGTH: what WRITE SAME(10) can say, and it ends well within a time-out on a slow
disk. It holds for NUMBER OF LOGICAL BLOCKS 0 (WSNZ=0) as well: to the end, if that is not farther."""

MAXIMUM_UNMAP_BLOCKS = 2**20
"""MAXIMUM UNMAP LBA COUNT: all descriptors of one UNMAP together."""

MAXIMUM_UNMAP_DESCRIPTORS = 256
"""MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT: 4 KiB of parameter list."""

LBA_STATUS_DESCRIPTORS = 4096
"""Descriptors of one GET LBA STATUS at most; the initiator asks again for the rest (SBC-3 §5.5.2)."""

PREFETCH_BYTES = 16 * 2**20
"""What PRE-FETCH reads ahead; of a longer range it does so much and answers GOOD, not CONDITION MET."""

COPY_CHUNK_BYTES = 2**20
"""Bodies that read or write long ranges do so in pieces of this, and look for an abort in between."""

SPACE_CHUNK_BYTES = 256 * 2**20
"""The same for what moves no data: unmapping, zeroing. A multiple of every unmap granularity, so that
pieces give back as much as the whole."""


LIMITED_SPACE_CHUNK_BYTES = 8 * 2**20
"""The same under I/O limits, which count what was allocated there."""


def maximum_transfer_blocks(block_size: int) -> int:
    """MAXIMUM TRANSFER LENGTH in blocks of ``block_size`` bytes."""
    return MAXIMUM_TRANSFER_BYTES // block_size


def atomic_granularity_blocks(physical_block_exponent: int) -> int:
    """ATOMIC ALIGNMENT and ATOMIC TRANSFER LENGTH GRANULARITY: physical blocks, as less would tear a block
    that the medium writes as one; 0: any, where they are no larger than logical ones or not told."""
    return 1 << physical_block_exponent if physical_block_exponent else 0


def pieces(offset: int, length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut ``length`` bytes from ``offset`` on at the multiples of ``chunk``: (offset, length) of each."""
    end = offset + length
    while offset < end:
        cut = min(end, offset - offset % chunk + chunk)
        yield offset, cut - offset
        offset = cut
