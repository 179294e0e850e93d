"""An asyncio loop whose data connections are served inside its wait for events.

The stock loop turns every readable descriptor into a list entry, a handle on a queue, and a call in a
context: about 6 µs a wake-up, and a target at depth 1 has one wake-up per command. Here the descriptors of
iSCSI connections are known to the selector itself, which calls straight when the kernel names them, and
waits again as long as that is all there is; all else (the API, timers, listeners, workers' results) goes
the stock way.

Rules for what is called: it must not block, and its exceptions are its own: one that gets out is a bug,
logged, and that descriptor is no longer served.
"""

import asyncio
import logging
import math
import select
import selectors
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack

__all__ = ["Loop"]

log = logging.getLogger("targetd.loop")

_Ts = TypeVarTuple("_Ts")

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_STOCK = ((selectors.EVENT_READ, _IN), (selectors.EVENT_WRITE, _OUT))


AT_ONCE = 64
"""Descriptors that are served between two looks at what else there is: a timer that is due, a callback that
was scheduled. epoll goes round: who was not among them is first the next time."""

NEWCOMERS_AT_ONCE = 2
"""Descriptors that were not promoted yet and are served in one turn of the loop. One costs some 0.2 ms from
its accept to its end: a flood of them delays the others by twice that, where without a queue of their own a
thousand may be ready at once."""


def _nothing() -> None:
    """Is never called."""


class _Served:
    """One descriptor that is served here."""

    __slots__ = ("epoll", "mask", "on_readable", "on_writable")

    def __init__(
        self, epoll: select.epoll, on_readable: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        self.epoll = epoll
        self.mask = _IN
        self.on_readable = on_readable
        self.on_writable = on_writable


class _Selector(selectors.BaseSelector):
    """epoll for both kinds of descriptors."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._served: dict[int, _Served] = {}
        self._newcomers = select.epoll()
        self._served[self._newcomers.fileno()] = _Served(self._epoll, self._serve_newcomers, _nothing)
        self._epoll.register(self._newcomers.fileno(), _IN)
        self.interrupted = False
        """Something was scheduled since ``select`` began."""

    # -- the stock kind, as asyncio asks for it -----------------------------------------------

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd in self._keys:
            raise KeyError(f"descriptor {fd} is registered already")
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._epoll.register(fd, _mask(events))
        self._keys[fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys.pop(fd)
        try:
            self._epoll.unregister(fd)
        except OSError:  # closed before it was unregistered: epoll has forgotten it by itself
            pass
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[fd]
        if key.events != events:
            self._epoll.modify(fd, _mask(events))
        key = selectors.SelectorKey(key.fileobj, fd, events, data)
        self._keys[fd] = key
        return key

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        return self._keys[fd]

    def close(self) -> None:
        self._newcomers.close()
        self._epoll.close()
        self._keys.clear()
        self._served.clear()

    # -- waiting ------------------------------------------------------------------------------

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Serve connections until there is something for the rest of the loop: a stock descriptor, a timer
        that is due, or a callback that was scheduled meanwhile."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        ready: list[tuple[selectors.SelectorKey, int]] = []
        self.interrupted = False
        while True:
            if timeout is None:
                wait = -1.0
            elif timeout > 0:
                wait = math.ceil(timeout * 1e3) * 1e-3  # epoll counts in ms: never wake up early, to spin
            else:
                wait = 0.0
            try:
                found = self._epoll.poll(wait, AT_ONCE)
            except InterruptedError:
                return ready
            for fd, mask in found:
                self._serve(fd, mask, ready)
            if ready or self.interrupted or not found:
                return ready
            if timeout is not None:
                timeout = deadline - time.monotonic()
                if timeout <= 0:
                    return ready

    def _serve(self, fd: int, mask: int, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        entry = self._served.get(fd)
        if entry is None:
            key = self._keys.get(fd)
            if key is not None:
                events = (selectors.EVENT_WRITE if mask & ~_IN else 0) | (
                    selectors.EVENT_READ if mask & ~_OUT else 0
                )
                ready.append((key, events & key.events))
            return
        try:
            if mask & ~_OUT:
                entry.on_readable()
            if mask & _OUT and self._served.get(fd) is entry and entry.mask & _OUT:
                entry.on_writable()
        except Exception:
            log.exception("a connection's handler failed; the connection is no longer served")
            self.forget(fd)

    def _serve_newcomers(self) -> None:
        for fd, mask in self._newcomers.poll(0, NEWCOMERS_AT_ONCE):
            self._serve(fd, mask, [])

    # -- the kind that is served here ---------------------------------------------------------

    def serve(self, fd: int, on_readable: Callable[[], None], on_writable: Callable[[], None]) -> None:
        self._served[fd] = _Served(self._newcomers, on_readable, on_writable)
        self._newcomers.register(fd, _IN)

    def promote(self, fd: int) -> None:
        entry = self._served.get(fd)
        if entry is not None and entry.epoll is self._newcomers:
            self._newcomers.unregister(fd)
            entry.epoll = self._epoll
            self._epoll.register(fd, entry.mask)

    def want(self, fd: int, *, read: bool, write: bool) -> None:
        entry = self._served[fd]
        mask = (_IN if read else 0) | (_OUT if write else 0)
        if mask != entry.mask:
            entry.mask = mask
            entry.epoll.modify(fd, mask)

    def forget(self, fd: int) -> None:
        entry = self._served.pop(fd, None)
        if entry is not None:
            entry.epoll.unregister(fd)


def _mask(events: int) -> int:
    mask = 0
    for stock, native in _STOCK:
        if events & stock:
            mask |= native
    return mask


class Loop(asyncio.SelectorEventLoop):
    """The loop of the daemon: ``asyncio.Runner(loop_factory=Loop)``."""

    def __init__(self) -> None:
        self._data = _Selector()
        super().__init__(self._data)

    def call_soon(
        self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self._data.interrupted = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        self._data.interrupted = True
        return super().call_at(when, callback, *args, context=context)

    def serve(self, fd: int, on_readable: Callable[[], None], on_writable: Callable[[], None]) -> None:
        """Call ``on_readable`` whenever ``fd`` has something (data, its end, an error). It is a newcomer:
        while many of them have something, the others come first."""
        self._data.serve(fd, on_readable, on_writable)

    def promote(self, fd: int) -> None:
        """No newcomer any more."""
        self._data.promote(fd)

    def want(self, fd: int, *, read: bool, write: bool) -> None:
        """What to be called for from now on."""
        self._data.want(fd, read=read, write=write)

    def forget(self, fd: int) -> None:
        """No longer; call before the descriptor is closed."""
        self._data.forget(fd)
