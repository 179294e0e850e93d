"""The limits this target announces in Block Limits (SBC-3 §6.6.3) and keeps. One place, each with its reason."""

__all__ = [
    "ATOMIC_BYTES",
    "COMPARE_AND_WRITE_BLOCKS",
    "OPTIMAL_TRANSFER_BYTES",
    "TRANSFER_BYTES",
    "UNMAP_BLOCKS",
    "UNMAP_DESCRIPTORS",
    "WRITE_SAME_BLOCKS",
]

TRANSFER_BYTES = 16 << 20
"""MAXIMUM TRANSFER LENGTH. A command is buffered whole: this times the queue depth bounds a session's
memory. Initiators split; Linux stops at 4 MiB or less, Windows at 2 MiB."""
OPTIMAL_TRANSFER_BYTES = 1 << 20
"""OPTIMAL TRANSFER LENGTH: beyond it a command gains nothing."""
COMPARE_AND_WRITE_BLOCKS = 1
"""MAXIMUM COMPARE AND WRITE LENGTH. Clustered file systems lock with one block (VMware ATS), and
one is what makes libiscsi's InvalidDataOutSize sound."""
UNMAP_BLOCKS = 1 << 20
"""MAXIMUM UNMAP LBA COUNT of one command: bounds how long one UNMAP holds a worker."""
UNMAP_DESCRIPTORS = 256
"""MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT: 4 KiB of parameter list."""
WRITE_SAME_BLOCKS = 1 << 18
"""MAXIMUM WRITE SAME LENGTH, for the same reason."""
ATOMIC_BYTES = 1 << 20
"""MAXIMUM ATOMIC TRANSFER LENGTH: at least 256 blocks at every block size."""
