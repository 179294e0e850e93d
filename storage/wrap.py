"""Stackable wrappers around a backend, for operators and for tests: ReadOnly, Slow, Faulty.

Each is a complete backend and may wrap another wrapper. A wrapper that has something to do on an
operation leaves the ``nowait`` calls to answer "not now", so that the operation comes to a worker, where
waiting and failing are allowed.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, TypeVar

from storage.base import Backend, Buffer, Done, Geometry, Rest, Run, Space

__all__ = ["OPERATIONS", "Fault", "Faulty", "ReadOnly", "Slow", "Wrapper"]

OPERATIONS = frozenset(
    ("read", "write", "flush", "unmap", "write_zeroes", "runs", "copy_from", "refresh", "resize", "space")
)
"""What can be slowed or made to fail; ``write`` with ``durable`` included, and the nowait calls as theirs."""


T = TypeVar("T")


class Wrapper(Backend):
    """Passes everything on. ``_before`` sees each operation first, and may wait or raise."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self._follow()

    def _follow(self) -> None:
        """Take over the inner backend's plain attributes."""
        self.geometry = self.inner.geometry
        self.capabilities = self.inner.capabilities
        self.status = self.inner.status
        self.last_error = self.inner.last_error
        self.lost_writes = self.inner.lost_writes

    def _before(self, operation: str, offset: int, length: int) -> None:
        """Called on a worker before ``operation`` on the range (0, 0 where it has none)."""

    def _concerned(self, operation: str, offset: int, length: int) -> bool:
        """Whether ``_before`` would do anything: then the nowait call answers "not now"."""
        return False

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return None if self._concerned("read", offset, length) else self.inner.read_nowait(offset, length)

    def copy_nowait(self, offset: int, length: int) -> Buffer | None:
        return None if self._concerned("read", offset, length) else self.inner.copy_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return not self._concerned("write", offset, len(data)) and self.inner.write_nowait(offset, data)

    def tick(self) -> None:
        self.inner.tick()
        self._follow()

    def serve_by(self, engine: Any) -> None:
        self.inner.serve_by(engine)

    def begin_read(self, offset: int, length: int, done: Done) -> bool:
        if self._concerned("read", offset, length):
            return False
        return self.inner.begin_read(offset, length, self._following(done))

    def begin_write(self, offset: int, data: Buffer, done: Done, *, durable: bool = False) -> bool:
        if self._concerned("write", offset, len(data)):
            return False
        return self.inner.begin_write(offset, data, self._following(done), durable=durable)

    def begin_flush(self, done: Done) -> bool:
        return not self._concerned("flush", 0, 0) and self.inner.begin_flush(self._following(done))

    def _following(self, done: Done) -> Done:
        def ended(result: Buffer | Rest | None) -> None:
            self._follow()
            done((lambda: self._passed(result)) if callable(result) else result)

        return ended

    def read(self, offset: int, length: int) -> Buffer:
        self._before("read", offset, length)
        return self._passed(lambda: self.inner.read(offset, length))

    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        self._before("write", offset, len(data))
        self._passed(lambda: self.inner.write(offset, data, durable=durable))

    def flush(self, offset: int = 0, length: int = 0) -> None:
        self._before("flush", offset, length)
        self._passed(lambda: self.inner.flush(offset, length))

    def unmap(self, offset: int, length: int) -> None:
        self._before("unmap", offset, length)
        self._passed(lambda: self.inner.unmap(offset, length))

    def write_zeroes(self, offset: int, length: int) -> None:
        self._before("write_zeroes", offset, length)
        self._passed(lambda: self.inner.write_zeroes(offset, length))

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        self._before("runs", offset, length)
        return self.inner.runs(offset, length)

    def copy_from(self, source: Backend, source_offset: int, offset: int, length: int) -> None:
        self._before("copy_from", offset, length)
        # From itself: the inner one must see that, as the ranges may overlap.
        origin = self.inner if source is self else source
        self._passed(lambda: self.inner.copy_from(origin, source_offset, offset, length))

    def refresh(self) -> Geometry:
        self._before("refresh", 0, 0)
        self._passed(self.inner.refresh)
        return self.geometry

    def resize(self, size_bytes: int) -> None:
        self._before("resize", 0, 0)
        self._passed(lambda: self.inner.resize(size_bytes))

    def space(self) -> Space:
        self._before("space", 0, 0)
        return self._passed(self.inner.space)

    def close(self) -> None:
        self.inner.close()

    def _passed(self, call: Callable[[], T]) -> T:
        try:
            return call()
        finally:
            self._follow()


class ReadOnly(Wrapper):
    """Refuses every change with EROFS."""

    def _follow(self) -> None:
        super()._follow()
        self.capabilities = changed(self.capabilities, writable=False, unmap=False, copy_offload=False)

    def _concerned(self, operation: str, offset: int, length: int) -> bool:
        return operation == "write"

    def _before(self, operation: str, offset: int, length: int) -> None:
        if operation in ("write", "unmap", "write_zeroes", "copy_from"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


class Slow(Wrapper):
    """Makes every operation wait: for a time, for a gate to open, or both."""

    def __init__(
        self,
        inner: Backend,
        delay_s: float = 0.0,
        *,
        gate: threading.Event | None = None,
        operations: frozenset[str] = OPERATIONS,
    ) -> None:
        """Slow ``operations`` of ``inner`` down.

        Args:
            delay_s: seconds before each.
            gate: each waits until it is set; cleared again, it stops the next ones.
        """
        super().__init__(inner)
        self.delay_s = delay_s
        self.gate = gate
        self.operations = operations
        self.waiting = threading.Semaphore(0)
        """Released once by each operation that is about to wait, so that a test can know that it does."""

    def _concerned(self, operation: str, offset: int, length: int) -> bool:
        return operation in self.operations

    def _before(self, operation: str, offset: int, length: int) -> None:
        if operation in self.operations:
            self.waiting.release()
            if self.delay_s:
                time.sleep(self.delay_s)
            if self.gate is not None:
                self.gate.wait()


@dataclass(slots=True)
class Fault:
    """An error to be met."""

    errno: int
    operations: frozenset[str] = OPERATIONS
    offset: int = 0
    """First byte that it concerns."""
    length: int | None = None
    """Bytes; None: to the end. Operations without a range are always concerned."""
    times: int | None = None
    """How often it strikes; None: until ``Faulty.clear``."""

    def strikes(self, operation: str, offset: int, length: int) -> bool:
        """Whether it concerns the operation; ``length`` 0 has no range."""
        if operation not in self.operations or self.times == 0:
            return False
        if not length:
            return True
        return offset + length > self.offset and (self.length is None or offset < self.offset + self.length)


class Faulty(Wrapper):
    """Fails as told. What fails has not been done at all; a failed flush counts as lost writes."""

    _own_lost_writes = 0

    def __init__(self, inner: Backend, *faults: Fault) -> None:
        super().__init__(inner)
        self._faults = list(faults)
        self._lock = threading.Lock()

    def fail(
        self,
        number: int,
        *operations: str,
        offset: int = 0,
        length: int | None = None,
        times: int | None = None,
    ) -> None:
        """From now on ``operations`` (none named: all) that touch the range end with errno ``number``."""
        unknown = set(operations) - OPERATIONS
        if unknown:
            raise ValueError(f"no such operations: {sorted(unknown)}")
        with self._lock:
            self._faults.append(Fault(number, frozenset(operations) or OPERATIONS, offset, length, times))

    def clear(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    def _concerned(self, operation: str, offset: int, length: int) -> bool:
        return any(fault.strikes(operation, offset, length) for fault in self._faults)

    def _before(self, operation: str, offset: int, length: int) -> None:
        with self._lock:
            for fault in self._faults:
                if fault.strikes(operation, offset, length):
                    if fault.times is not None:
                        fault.times -= 1
                    error = OSError(fault.errno, os.strerror(fault.errno))
                    if operation == "flush":
                        self._own_lost_writes += 1
                    self._follow()
                    self.last_error = OSError(fault.errno, os.strerror(fault.errno))
                    raise error

    def _follow(self) -> None:
        super()._follow()
        self.lost_writes += self._own_lost_writes
