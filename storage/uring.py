"""io_uring without a library: reads, writes and flushes that the kernel does while the event loop goes on.

A command that has to wait for a medium costs a worker thread some 100 µs of processor, most of it for the
interpreter's lock. Here it is 64 bytes in memory that the kernel shares with us, one system call for all
that a turn of the loop has begun, and 16 bytes that come back; nobody waits. Linux 6.18, 4 KiB at random from
a file that is not in memory: 11 µs a read at depth 32, of which the kernel has most.

Rules:

1. **One thread**, that of the event loop, begins, submits and reaps. Nothing waits; there is no lock.
2. **A buffer belongs to the kernel until the completion has come.** An ``Operation`` holds its buffer and its
   ``Handle``, and the ring holds the operation: whatever becomes of the command (an abort, a reset, a session
   that ends, a backend that is closed), neither the memory nor the descriptor's number is used for anything
   else before. Nothing is ever cancelled half-way.
3. **The slots of a medium are its own.** ``Slots`` bounds what is under way for one medium, and what is
   beyond that waits here, not in the kernel; a medium that hangs fills its own slots and no others. What
   cannot be done without waiting the kernel gives to threads of its own, ``MOST_THREADS`` at most.
4. **Only plain success is success here.** A short count or an error goes back to the backend as it is.

Why by hand: the packages of the index that wrap liburing take no buffers of ours, and a wrapped call per
operation is what costs. Memory order: the kernel reads our entries within our own system call; what it writes
it may write from another processor, so an ARM fence (membarrier(2)) stands before those are read.

Source: io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2), linux/io_uring.h.
"""

import ctypes
import errno
import logging
import math
import mmap
import os
import platform
import sys
from collections import deque
from collections.abc import Callable
from struct import Struct
from time import perf_counter

from storage import linux
from storage.handle import Handle

__all__ = ["Operation", "Ring", "Slots", "address_of"]

log = logging.getLogger(__name__)

ENTRIES = 512
"""Operations that one system call submits at most; more take several."""

MOST_THREADS = 4096
"""Of the kernel's, for what cannot be done without waiting: they exist only while they are at work or have
just been. RLIMIT_NPROC may make it fewer."""

STALL_S = 0.020
"""A submission that takes longer has waited for a medium, which it should not (a full request queue, a file
system that reads its own tables first): several of the interpreter's switch intervals."""
STALL_PAUSE = 20
"""For how many times as long all that the same media begin goes straight to the kernel's threads: so the
event loop waits for them a twentieth of its time at most."""

_MACHINES = frozenset(("x86_64", "aarch64"))

# The same numbers on both.
_SETUP, _ENTER, _REGISTER = 425, 426, 427

_SETUP_COOP_TASKRUN = 1 << 8  # Linux 5.19: completions do not interrupt us, they wait for our next call
_FEATURES = {
    1 << 0: "one mapping for both rings",
    1 << 1: "no completion is dropped",
    1 << 9: "threads of the process",
}
"""What must be there (io_uring_setup(2)): Linux 5.12 has all."""
_REGISTER_IOWQ_MAX_WORKERS = 19  # Linux 5.15
_ENTER_GETEVENTS = 1
_SQ_CQ_OVERFLOW = 1 << 1
_OFFSET_RINGS, _OFFSET_SQES = 0, 0x10000000
_SQE_ASYNC = 1 << 4

OP_FSYNC, OP_READ, OP_WRITE, OP_FADVISE = 3, 22, 23, 24
FSYNC_DATASYNC = 1

_SQE = Struct("<BBHiQQIIQ24x")
"""opcode, flags, ioprio, fd, offset, address, length, flags of the operation, user data."""
_CQE = Struct("<QiI")
"""user data, result, flags."""
_MASK = 0xFFFFFFFF

_MEMBARRIER = {"aarch64": 283}
_MEMBARRIER_PRIVATE_EXPEDITED, _MEMBARRIER_REGISTER_PRIVATE_EXPEDITED = 8, 16

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall_enter = ctypes.CDLL(None, use_errno=True).syscall  # with types of its own
_syscall_enter.argtypes = (
    *(ctypes.c_long, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint),
    *(ctypes.c_void_p, ctypes.c_size_t),
)

_BYTES_AT = bytes.__basicsize__ - 1
"""Where the bytes of a ``bytes`` object begin, in CPython; ``Ring`` makes sure before it relies on it."""


class _SqOffsets(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("head", "tail", "mask", "entries", "flags", "dropped", "array", "r1", "r2", "r3")
    )


class _CqOffsets(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("head", "tail", "mask", "entries", "overflow", "cqes", "flags", "r1", "r2", "r3")
    )


class _Params(ctypes.Structure):
    _fields_ = (
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 3),
        ("sq", _SqOffsets),
        ("cq", _CqOffsets),
    )


def address_of(data: bytes | bytearray | memoryview) -> int:
    """Where the bytes of ``data`` are, for as long as it lives and keeps its size."""
    if data.__class__ is bytes:
        return id(data) + _BYTES_AT
    return linux.address_of(data)


class Operation:
    """One operation on its way through the ring. ``ended`` is called on the event loop, once, with what the
    system call of the same name would have returned, or minus its errno."""

    __slots__ = ("address", "code", "data", "ended", "flags", "handle", "length", "offset", "slots")

    def __init__(
        self,
        slots: "Slots",
        code: int,
        handle: Handle,
        offset: int,
        data: bytes | bytearray | memoryview,
        length: int,
        flags: int,
        ended: Callable[[int], None],
    ) -> None:
        self.slots = slots
        self.code = code
        self.handle = handle
        self.offset = offset
        self.data = data
        self.address = address_of(data) if length and data else 0
        self.length = length
        self.flags = flags
        self.ended = ended


class Slots:
    """What one medium may have under way at a time; the rest waits for it here, in order."""

    __slots__ = ("_ring", "_waiting", "by_threads_until", "depth", "in_flight")

    def __init__(self, ring: "Ring", depth: int, *, by_threads: bool = False) -> None:
        """``by_threads``: each operation is a kernel thread's from its beginning."""
        self._ring = ring
        self.depth = depth
        self.in_flight = 0
        self._waiting: deque[Operation] = deque()
        self.by_threads_until = math.inf if by_threads else 0.0
        """``perf_counter`` reading up to which nothing of it is tried on the event loop's time."""

    def read(
        self, handle: Handle, offset: int, data: bytes | bytearray | memoryview, ended: Callable[[int], None]
    ) -> None:
        """Fill ``data`` from the medium. Nobody else may have seen ``data``, be it ``bytes``."""
        self._begin(Operation(self, OP_READ, handle, offset, data, len(data), 0, ended))

    def write(
        self,
        handle: Handle,
        offset: int,
        data: bytes | bytearray | memoryview,
        flags: int,
        ended: Callable[[int], None],
    ) -> None:
        """``flags``: as pwritev2(2) takes them. ``data`` stays as it is until the end."""
        self._begin(Operation(self, OP_WRITE, handle, offset, data, len(data), flags, ended))

    def flush(self, handle: Handle, ended: Callable[[int], None]) -> None:
        """fdatasync(2)."""
        self._begin(Operation(self, OP_FSYNC, handle, 0, b"", 0, FSYNC_DATASYNC, ended))

    @property
    def post(self) -> Callable[[Callable[[], None]], None]:
        """Has something called on the event loop, from any thread."""
        return self._ring.post

    def advise(
        self, handle: Handle, offset: int, length: int, advice: int, ended: Callable[[int], None]
    ) -> None:
        """posix_fadvise(2)."""
        self._begin(Operation(self, OP_FADVISE, handle, offset, b"", length, advice, ended))

    def _begin(self, operation: Operation) -> None:
        if self.in_flight < self.depth:
            self.in_flight += 1
            self._ring.push(operation)
        else:
            self._waiting.append(operation)

    def one_ended(self) -> None:
        """The next may begin."""
        if self._waiting and self.in_flight <= self.depth:
            self._ring.push(self._waiting.popleft())
        else:
            self.in_flight -= 1


class Ring:
    """The io_uring of a process. ``fd`` is readable when something has ended: call ``reap`` then."""

    def __init__(
        self,
        schedule: Callable[[Callable[[], None]], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """Set it up, and see that it works.

        Args:
            schedule: has ``submit`` called before the event loop sleeps next.
            post: has something called on the event loop, from any thread.

        Raises:
            OSError: the kernel has none, does not allow it, or has one too old; the text says which.
        """
        self.fd = -1
        self.post = post
        self._schedule = schedule
        self._scheduled = False
        self._queue: deque[Operation] = deque()
        self._operations: dict[int, Operation] = {}
        """Under way, by user data. Never freed, not even when the interpreter ends with something under way:
        a write that its medium lets go on then must still find its own data there."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._operations))
        self._key = 0
        self._fence = _no_fence
        self._words = memoryview(b"")
        self._mapped: tuple[mmap.mmap, ...] = ()
        try:
            self._open()
            self._check()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if platform.machine() not in _MACHINES or sys.byteorder != "little":
            raise OSError(errno.ENOSYS, f"it is not made for {platform.machine()}")
        self._fence = _fence_for(platform.machine())
        params = _Params(flags=_SETUP_COOP_TASKRUN)
        fd = _syscall(_SETUP, ENTRIES, ctypes.byref(params))
        if fd < 0 and ctypes.get_errno() == errno.EINVAL:
            params = _Params()
            fd = _syscall(_SETUP, ENTRIES, ctypes.byref(params))
        if fd < 0:
            raise _refusal(ctypes.get_errno())
        self.fd = fd
        for bit, words in _FEATURES.items():
            if not params.features & bit:
                raise OSError(errno.ENOSYS, f"the kernel's is too old: {words} is missing")
        sq, cq = params.sq, params.cq
        size = max(sq.array + 4 * params.sq_entries, cq.cqes + _CQE.size * params.cq_entries)
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._rings = mmap.mmap(fd, size, flags=flags, offset=_OFFSET_RINGS)
        self._sqes = mmap.mmap(fd, _SQE.size * params.sq_entries, flags=flags, offset=_OFFSET_SQES)
        self._mapped = (self._rings, self._sqes)
        self._words = words32 = memoryview(self._rings)[: size & -4].cast("I")
        self._entries = params.sq_entries
        self._sq_head, self._sq_tail, self._sq_flags = sq.head // 4, sq.tail // 4, sq.flags // 4
        self._sq_mask = words32[sq.mask // 4]
        self._cq_head, self._cq_tail, self._cqes = cq.head // 4, cq.tail // 4, cq.cqes
        self._cq_mask = words32[cq.mask // 4]
        for index in range(params.sq_entries):
            words32[sq.array // 4 + index] = index
        most = (ctypes.c_uint32 * 2)(MOST_THREADS, 0)
        if _syscall(_REGISTER, fd, _REGISTER_IOWQ_MAX_WORKERS, ctypes.byref(most), 2):
            raise OSError(ctypes.get_errno(), "the kernel's is too old: its threads cannot be bounded")

    def _check(self) -> None:
        """Read something through it, and look where it went."""
        said = os.urandom(64)
        answers: list[int] = []
        handle = Handle(os.memfd_create("iscsi-targetd-uring", os.MFD_CLOEXEC))
        os.write(handle.fd, said)
        data = bytes(len(said))
        Slots(self, 1).read(handle, 0, data, answers.append)
        schedule, self._schedule = self._schedule, _nothing
        self.submit()
        self._enter(0, 1)
        self.reap()
        self._schedule = schedule
        if answers != [len(said)] or data != said:
            raise OSError(errno.ENOSYS, f"it does not read what it should: {answers}")

    # -- beginning --------------------------------------------------------------------------------

    def slots(self, depth: int, *, by_threads: bool = False) -> Slots:
        """The share of one medium. ``by_threads``: what the kernel tries first may wait all the same, as file
        systems do that ask another process or host for a file's size before they look what is in memory."""
        return Slots(self, depth, by_threads=by_threads)

    def push(self, operation: Operation) -> None:
        """To be submitted before the event loop sleeps."""
        self._queue.append(operation)
        if not self._scheduled:
            self._scheduled = True
            self._schedule(self.submit)

    def submit(self) -> None:
        """Hand over all that was begun."""
        self._scheduled = False
        if self.fd < 0:
            return
        queue, words, sqes, operations = self._queue, self._words, self._sqes, self._operations
        mask, pack = self._sq_mask, _SQE.pack_into
        key = self._key
        while True:
            tail = words[self._sq_tail]
            unsent = (tail - words[self._sq_head]) & _MASK
            took = perf_counter()
            begun: list[Operation] = []
            while queue and unsent < self._entries:
                each = queue.popleft()
                key += 1
                operations[key] = each
                begun.append(each)
                pack(
                    sqes,
                    _SQE.size * (tail & mask),
                    each.code,
                    _SQE_ASYNC if each.slots.by_threads_until > took else 0,
                    0,
                    each.handle.fd,
                    each.offset,
                    each.address,
                    each.length,
                    each.flags,
                    key,
                )
                tail = (tail + 1) & _MASK
                unsent += 1
            self._key = key
            words[self._sq_tail] = tail
            if not unsent:
                return
            sent = self._enter(unsent, 0)
            took = perf_counter() - took
            if took > STALL_S:
                until = perf_counter() + STALL_PAUSE * took
                for each in begun:
                    each.slots.by_threads_until = max(each.slots.by_threads_until, until)
            if sent < unsent:
                # No memory, or completions are to be reaped first: once more at the end of the next turn.
                self._scheduled = True
                self._schedule(self.submit)
                return
            if not queue:
                return

    def _enter(self, count: int, wait: int) -> int:
        """How many the kernel has taken."""
        while True:
            flags = _ENTER_GETEVENTS if wait or not count else 0
            sent: int = _syscall_enter(_ENTER, self.fd, count, wait, flags, None, 0)
            if sent >= 0:
                return sent
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
                return 0
            if number != errno.EINTR:
                raise OSError(number, f"io_uring_enter: {os.strerror(number)}")

    # -- ending -----------------------------------------------------------------------------------

    def reap(self) -> int:
        """Tell all that has ended. Returns how many those were."""
        words, rings, mask, unpack = self._words, self._rings, self._cq_mask, _CQE.unpack_from
        operations = self._operations
        told = 0
        while True:
            head = words[self._cq_head]
            tail = words[self._cq_tail]
            if head == tail:
                if not words[self._sq_flags] & _SQ_CQ_OVERFLOW:
                    return told
                self._enter(0, 0)  # the kernel keeps what had no room, and now there is
                tail = words[self._cq_tail]
                if head == tail:
                    return told
            self._fence()
            ended = []
            while head != tail:
                key, result, _ = unpack(rings, self._cqes + _CQE.size * (head & mask))
                ended.append((operations.pop(key), result))
                head = (head + 1) & _MASK
            words[self._cq_head] = head
            for operation, result in ended:
                operation.slots.one_ended()
                try:
                    operation.ended(result)
                except Exception:
                    log.exception("the end of an operation was not told; its command stays open")
            told += len(ended)

    @property
    def under_way(self) -> int:
        """Operations that the kernel has, or is about to be given."""
        return len(self._operations) + len(self._queue)

    def close(self) -> None:
        """No more of it. What the kernel still has keeps its buffers, for ever if need be (rule 2)."""
        if self.fd >= 0:
            self._words.release()
            for each in self._mapped:  # it has a duplicate of the descriptor
                each.close()
            os.close(self.fd)
            self.fd = -1


def _nothing(call: Callable[[], None]) -> None:
    """Schedules nothing."""


def _no_fence() -> None:
    """x86 reads in order."""


def _fence_for(machine: str) -> Callable[[], None]:
    number = _MEMBARRIER.get(machine)
    if number is None:
        return _no_fence
    if _syscall(number, _MEMBARRIER_REGISTER_PRIVATE_EXPEDITED, 0, 0):
        raise OSError(ctypes.get_errno(), "membarrier(2) is not to be had")

    def fence() -> None:
        _syscall(number, _MEMBARRIER_PRIVATE_EXPEDITED, 0, 0)

    return fence


_REFUSALS = {
    errno.ENOSYS: "the kernel has none, or a sandbox hides it",
    errno.EPERM: "it is forbidden (sysctl kernel.io_uring_disabled, or the seccomp profile of a container)",
    errno.EACCES: "it is forbidden by a security module",
    errno.ENOMEM: "there is no memory for it (RLIMIT_MEMLOCK)",
}


def _refusal(number: int) -> OSError:
    return OSError(number, _REFUSALS.get(number, os.strerror(number)))
