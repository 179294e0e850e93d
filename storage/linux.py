"""System calls and numbers that Python's standard library does not offer. Knows no backend.

Everything here is a thin function over one call: it raises ``OSError`` with the errno of the call and
keeps no state. The numbers are from the kernel's ``linux/falloc.h``, ``linux/fs.h``, ``linux/blkdev.h``
and ``linux/magic.h``.
"""

import ctypes
import errno
import fcntl
import os
from struct import Struct

__all__ = [
    "BTRFS",
    "EXT4",
    "F2FS",
    "FALLOC_FL_KEEP_SIZE",
    "NFS",
    "OVERLAYFS",
    "RAMFS",
    "TMPFS",
    "XFS",
    "ZFS",
    "address_of",
    "birth_time",
    "clone",
    "discard",
    "disk_sequence",
    "fallocate",
    "file_system",
    "is_read_only",
    "is_rotational",
    "logical_block_size",
    "mincore",
    "physical_block_size",
    "punch_hole",
    "size_of_device",
    "zero_out",
    "zero_range",
]

EXT4 = 0xEF53
XFS = 0x58465342
BTRFS = 0x9123683E
F2FS = 0xF2F52010
TMPFS = 0x01021994
RAMFS = 0x858458F6
ZFS = 0x2FC12FC1
OVERLAYFS = 0x794C7630
NFS = 0x6969

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

FICLONE = 0x40049409

BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277
BLKPBSZGET = 0x127B
BLKROTATIONAL = 0x127E
BLKZEROOUT = 0x127F
BLKGETSIZE64 = 0x80081272
BLKGETDISKSEQ = 0x80081280

_RANGE = Struct("=QQ")
_U64 = Struct("=Q")
_INT = Struct("=i")
_SHORT = Struct("=H")

_libc = ctypes.CDLL(None, use_errno=True)
# PyDLL keeps the GIL: a mincore of one chunk takes about a microsecond and waits for nothing on a disk,
# while giving the GIL up and getting it back can take a whole switch interval.
_libc_holding_gil = ctypes.PyDLL(None, use_errno=True)

_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_mincore = _libc_holding_gil.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

_statx = _libc.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)

AT_EMPTY_PATH = 0x1000
STATX_BTIME = 0x800
_STATX_SIZE = 256
_STATX_MASK = Struct("=I")
_STATX_BTIME = Struct("=qI")
_STATX_BTIME_AT = 80
"""``stx_btime`` in ``struct statx`` (statx(2))."""

_STATFS_SIZE = 256
"""Bytes; more than ``struct statfs`` takes on any Linux (120 on x86-64)."""

_vectors: dict[int, type[ctypes.Array[ctypes.c_char]]] = {}
"""mincore's answer as a ctypes type, by number of pages: making the type costs more than the call."""


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of CPython's buffer protocol (PEP 3118)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(data: object) -> int:
    """Where a contiguous buffer has its bytes in memory: true while ``data`` lives and is not resized.

    ctypes' ``from_buffer`` wants a writable one, and ours need not be.
    """
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    address: int = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its mode flags (``os.posix_fallocate`` has none, and writes zeros where it must)."""
    while _fallocate(fd, mode, offset, length):
        if ctypes.get_errno() != errno.EINTR:
            raise _error()  # kept in no local: frame and error would keep each other, and the descriptor


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the range back; it reads as zeros, partial blocks included. EOPNOTSUPP where that cannot be."""
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeros and keep (or take) its space. EOPNOTSUPP where that cannot be."""
    fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)


def clone(source: int, destination: int) -> None:
    """Make a file's content that of another, sharing the blocks. EOPNOTSUPP or EXDEV where that cannot be."""
    fcntl.ioctl(destination, FICLONE, source)


def file_system(fd: int) -> int:
    """The magic number of the file system that holds ``fd``: ``EXT4``, ``XFS`` …"""
    answer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _fstatfs(fd, answer):
        raise _error()
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF


def birth_time(fd: int) -> int | None:
    """When the inode was made, nanoseconds since the epoch; None where the file system does not keep it."""
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(fd, b"", AT_EMPTY_PATH, STATX_BTIME, answer):
        return None
    if not _STATX_MASK.unpack_from(answer)[0] & STATX_BTIME:
        return None
    seconds, nanoseconds = _STATX_BTIME.unpack_from(answer, _STATX_BTIME_AT)
    return int(seconds) * 10**9 + int(nanoseconds)


def mincore(address: int, length: int, pages: int) -> bytes:
    """One byte for each page from ``address``: 1 where touching it reads nothing from the medium, else 0."""
    vector = _vectors.get(pages)
    if vector is None:
        vector = _vectors[pages] = ctypes.c_char * pages
    answer = vector()
    if _mincore(address, length, answer):
        raise _error()
    return answer.raw


# -- block devices --------------------------------------------------------------------------------


def _ask(fd: int, request: int, layout: Struct) -> int:
    answer = bytearray(layout.size)
    fcntl.ioctl(fd, request, answer)
    value: int = layout.unpack(answer)[0]
    return value


def size_of_device(fd: int) -> int:
    """Bytes; 0 when the device has been taken away."""
    return _ask(fd, BLKGETSIZE64, _U64)


def logical_block_size(fd: int) -> int:
    """Bytes."""
    return _ask(fd, BLKSSZGET, _INT)


def physical_block_size(fd: int) -> int:
    """Bytes."""
    return _ask(fd, BLKPBSZGET, _INT)


def is_rotational(fd: int) -> bool:
    """Whether the kernel takes the device for a spinning disk."""
    return bool(_ask(fd, BLKROTATIONAL, _SHORT))


def is_read_only(fd: int) -> bool:
    """Whether the device refuses writes whoever opens it."""
    return bool(_ask(fd, BLKROGET, _INT))


def disk_sequence(fd: int) -> int | None:
    """A number that no other disk since boot has had; None before Linux 5.15."""
    try:
        return _ask(fd, BLKGETDISKSEQ, _U64)
    except OSError:
        return None


def discard(fd: int, offset: int, length: int) -> None:
    """Tell the device that the range is not needed. What it reads as afterwards is the device's affair."""
    fcntl.ioctl(fd, BLKDISCARD, _RANGE.pack(offset, length))


def zero_out(fd: int, offset: int, length: int) -> None:
    """Make the range of a device read as zeros, keeping its space; the kernel writes zeros where it must."""
    fcntl.ioctl(fd, BLKZEROOUT, _RANGE.pack(offset, length))
