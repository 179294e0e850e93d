"""An asyncio loop whose data connections are served inside its wait for events.

The stock loop turns every readable descriptor into a list entry, a handle on a queue, and a call in a
context: about 6 µs a wake-up, and a target at depth 1 has one wake-up per command. Here the descriptors of
iSCSI connections are known to the selector itself, which calls straight when the kernel names them, and
waits again as long as that is all there is; all else (the API, timers, listeners, workers' results) goes
the stock way.

Asking again before sleeping
----------------------------
To sleep and be woken costs more than a small command: in a virtual machine a core that has nothing to do is
left to the host, and comes back by an interrupt. Who works at depth 1 pays that with each command. So after
the answer to a lone command epoll is asked again for up to ``LONGEST_S`` before sleeping, as KVM's halt_poll
and Linux' haltpoll do, and by their rule (``Patience``): as long as that has been worth it. Measured on two
cores with nothing else to do: p50 of 4 KiB reads at depth 1 60 → 25 µs at the same CPU a command. At depth 32
it would make smaller batches, so it is for who had nothing else under way.

A turn, and who comes next
--------------------------
One call of ``on_readable`` is a turn of one connection. It ends after ``TURN_S``, whatever bytes ask for: who
has work left then says so (``Turn.MORE``) and stands in a queue. Between two turns of the queue the kernel is
asked who has something, and those that do not stand in it come first. So who asks for little waits for one
turn, however many ask for much; those that ask for much share what is left, round robin, by time and not by
bytes; and none waits for ever, as each look at the kernel's list is followed by a turn of the queue. (Deficit
round robin with new flows first, as in fq_codel, RFC 8290 §4, with microseconds in the place of bytes.)

Connections that were not promoted, logins and discovery sessions, have a queue of their own, and with it one
turn in ``NEWCOMERS_WAIT`` while both have somebody in them.

Rules for what is called: it must not block, and its exceptions are its own: one that gets out is a bug,
logged, and that descriptor is no longer served. ``on_readable`` returns a ``Turn``.
"""

import asyncio
import logging
import math
import os
import select
import selectors
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import Context
from enum import IntEnum
from typing import Any, TypeVarTuple, Unpack

__all__ = ["TURN_S", "Loop", "Turn"]

log = logging.getLogger("targetd.loop")

_Ts = TypeVarTuple("_Ts")

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_STOCK = ((selectors.EVENT_READ, _IN), (selectors.EVENT_WRITE, _OUT))


TURN_S = 200e-6
"""Longest turn of a connection while it has more to do. To end one and begin another costs 3 µs; an initiator
that waits for each answer has one READ in some 100 µs."""

NEWCOMERS_WAIT = 4

SWITCH_S = 200e-6
"""How long a thread that computes (one writes the metrics) keeps the interpreter from the loop's, which gives
it away with each system call, three times a READ; each time could cost it Python's own 5 ms. Reasoned, not
measured."""


class Turn(IntEnum):
    """How a turn of a connection ended."""

    OVER = 0
    """All that had come is done."""
    SOON = 1
    """So it is, and the peer is likely to be heard again at once: what it had to say is answered."""
    MORE = 2
    """Its time was over, or it has something to do though nothing has come."""


AT_ONCE = 64
"""Descriptors that are served between two looks at what else there is: a timer that is due, a callback that
was scheduled. epoll goes round: who was not among them is first the next time."""

NEWCOMERS_AT_ONCE = 2
"""Descriptors that were not promoted yet and are served in one turn of the loop. One costs some 0.2 ms from
its accept to its end: a flood of them delays the others by twice that, where without a queue of their own a
thousand may be ready at once."""


PUT_OFF_S = 1e-3
"""How long to wait at most while something could not be done before waiting, and is tried again."""

LONGEST_S = 200e-6
"""How long epoll is asked again at most before sleeping; KVM's and haltpoll's default."""
SHORTEST_S = 10e-6
PREEMPTED_S = 100e-6
"""Between two questions, which take 1 µs: others need this core."""
REST_S = 0.1
"""How long it is theirs then."""


def _nothing() -> None:
    """Is never called."""


class Patience:
    """How long to ask again before sleeping. Times in seconds; knows no clock."""

    __slots__ = ("_longest", "_rests_until", "window")

    def __init__(self, cores: int) -> None:
        """``cores``: that this process may use; on one alone, the peer cannot answer while we ask."""
        self.window = 0.0
        """How long to ask now; 0 = not at all."""
        self._longest = LONGEST_S if cores > 1 else 0.0
        self._rests_until = 0.0

    def waited(self, waited: float, now: float) -> None:
        """It had to sleep: an answer took so long. Longer than we would ever ask: not worth it; else ask
        longer the next time."""
        if waited > self._longest or now < self._rests_until:
            self.window = 0.0
        elif waited > self.window:
            self.window = min(self._longest, 2 * self.window or SHORTEST_S)

    def preempted(self, now: float) -> None:
        """There are more that want to run than cores."""
        self.window = 0.0
        self._rests_until = now + REST_S


class _Served:
    """One descriptor that is served here."""

    __slots__ = ("epoll", "fd", "mask", "on_readable", "on_writable", "queued")

    def __init__(
        self,
        fd: int,
        epoll: select.epoll,
        on_readable: Callable[[], Turn],
        on_writable: Callable[[], None],
    ) -> None:
        self.fd = fd
        self.epoll = epoll
        self.queued = False
        """It stands in the queue: what comes waits until it is its turn there."""
        self.mask = _IN
        self.on_readable = on_readable
        self.on_writable = on_writable


class _Keys(Mapping[Any, selectors.SelectorKey]):
    """What the stock selectors give as their map: looked up by a descriptor's number or by its object, as
    asyncio does since Python 3.13 with whatever ``add_reader`` and ``remove_reader`` were given."""

    def __init__(self, keys: dict[int, selectors.SelectorKey]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys[_number(fileobj)]


class _Selector(selectors.BaseSelector):
    """epoll for both kinds of descriptors."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._map = _Keys(self._keys)
        self._served: dict[int, _Served] = {}
        self._newcomers = select.epoll()
        self._served[self._newcomers.fileno()] = _Served(
            self._newcomers.fileno(), self._epoll, self._serve_newcomers, _nothing
        )
        self._queue: deque[_Served] = deque()
        """Who has more to do, but for newcomers."""
        self._newcomers_queue: deque[_Served] = deque()
        self._turns = 0
        self._epoll.register(self._newcomers.fileno(), _IN)
        self._patience = Patience(len(os.sched_getaffinity(0)))
        self.interrupted = False
        """Something was scheduled since ``select`` began."""
        self.before_waiting: list[Callable[[], None]] = []
        """To be called once, before the kernel is asked what there is."""

    # -- the stock kind, as asyncio asks for it -----------------------------------------------

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _number(fileobj)
        if fd in self._keys:
            raise KeyError(f"descriptor {fd} is registered already")
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._epoll.register(fd, _mask(events))
        self._keys[fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        fd = _number(fileobj)
        key = self._keys.pop(fd)
        try:
            self._epoll.unregister(fd)
        except OSError:  # closed before it was unregistered: epoll has forgotten it by itself
            pass
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _number(fileobj)
        key = self._keys[fd]
        if key.events != events:
            self._epoll.modify(fd, _mask(events))
        key = selectors.SelectorKey(key.fileobj, fd, events, data)
        self._keys[fd] = key
        return key

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._map

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._map[fileobj]

    def close(self) -> None:
        self._newcomers.close()
        self._epoll.close()
        self._keys.clear()
        self._served.clear()

    # -- waiting ------------------------------------------------------------------------------

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Serve connections until there is something for the rest of the loop: a stock descriptor, a timer
        that is due, or a callback that was scheduled meanwhile."""
        patience, monotonic = self._patience, time.monotonic
        now = monotonic()
        deadline = math.inf if timeout is None else now + timeout
        ready: list[tuple[selectors.SelectorKey, int]] = []
        self.interrupted = False
        soon = False
        """Somebody is likely to be heard at once."""
        while True:
            if self.before_waiting:
                self._end_turn()
                if self.interrupted:
                    return ready
            queued = self._queue or self._newcomers_queue
            if queued:
                wait = 0.0
            elif self.before_waiting:  # put off once more: nothing may come that would wake us for it
                wait = PUT_OFF_S
            elif timeout is None:
                wait = -1.0
            elif timeout > 0:
                wait = math.ceil(timeout * 1e3) * 1e-3  # epoll counts in ms: never wake up early, to spin
            else:
                wait = 0.0
            try:
                found = self._ask_again(now) if soon and patience.window and not queued else []
                if not found:
                    found = self._epoll.poll(wait, AT_ONCE)
                    if soon and not queued:
                        woken = monotonic()
                        patience.waited(woken - now, woken)
            except InterruptedError:
                return ready
            soon = False
            for fd, mask in found:
                if self._serve(fd, mask, ready) == Turn.SOON:
                    soon = True
            if queued:
                self._serve_queue()
            if ready or self.interrupted or not (found or queued):
                return ready
            now = monotonic()
            if timeout is not None:
                timeout = deadline - now
                if timeout <= 0:
                    return ready

    def _end_turn(self) -> None:
        calls, self.before_waiting = self.before_waiting, []
        for call in calls:
            try:
                call()
            except Exception:
                log.exception("what was put off to the end of a turn failed")

    def _ask_again(self, now: float) -> list[tuple[int, int]]:
        """Who has something within the window."""
        poll, monotonic = self._epoll.poll, time.monotonic
        until = now + self._patience.window
        while True:
            found = poll(0, AT_ONCE)
            if found:
                return found
            before, now = now, monotonic()
            if now >= until:
                if now - before > PREEMPTED_S:
                    self._patience.preempted(now)
                return found

    def _serve(self, fd: int, mask: int, ready: list[tuple[selectors.SelectorKey, int]]) -> Turn:
        """Returns what ``on_readable`` did."""
        turn = Turn.OVER
        entry = self._served.get(fd)
        if entry is None:
            key = self._keys.get(fd)
            if key is not None:
                events = (selectors.EVENT_WRITE if mask & ~_IN else 0) | (
                    selectors.EVENT_READ if mask & ~_OUT else 0
                )
                ready.append((key, events & key.events))
            return turn
        try:
            if mask & ~_OUT and not entry.queued:
                turn = entry.on_readable()
                if turn == Turn.MORE:
                    self._enqueue(entry)
            if mask & _OUT and self._served.get(fd) is entry and entry.mask & _OUT:
                entry.on_writable()
        except Exception:
            log.exception("a connection's handler failed; the connection is no longer served")
            self.forget(fd)
        return turn

    def _serve_newcomers(self) -> Turn:
        for fd, mask in self._newcomers.poll(0, NEWCOMERS_AT_ONCE):
            self._serve(fd, mask, [])
        return Turn.OVER

    def _enqueue(self, entry: _Served) -> None:
        if not entry.queued and self._served.get(entry.fd) is entry:
            entry.queued = True
            (self._newcomers_queue if entry.epoll is self._newcomers else self._queue).append(entry)

    def _serve_queue(self) -> None:
        """One turn of who has waited longest for it."""
        self._turns += 1
        newcomers = self._newcomers_queue and (not self._queue or self._turns % NEWCOMERS_WAIT == 0)
        entry = (self._newcomers_queue if newcomers else self._queue).popleft()
        entry.queued = False
        if self._served.get(entry.fd) is entry:
            self._serve(entry.fd, _IN, [])

    # -- the kind that is served here ---------------------------------------------------------

    def serve(self, fd: int, on_readable: Callable[[], Turn], on_writable: Callable[[], None]) -> None:
        self._served[fd] = _Served(fd, self._newcomers, on_readable, on_writable)
        self._newcomers.register(fd, _IN)

    def promote(self, fd: int) -> None:
        entry = self._served.get(fd)
        if entry is not None and entry.epoll is self._newcomers:
            self._newcomers.unregister(fd)
            entry.epoll = self._epoll
            self._epoll.register(fd, entry.mask)

    def again(self, fd: int) -> None:
        self._enqueue(self._served[fd])

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


def _number(fileobj: Any) -> int:
    """Of a descriptor, or of an object that has one."""
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _mask(events: int) -> int:
    mask = 0
    for stock, native in _STOCK:
        if events & stock:
            mask |= native
    return mask


class Loop(asyncio.SelectorEventLoop):
    """The loop of the daemon: ``asyncio.Runner(loop_factory=Loop)``."""

    def __init__(self) -> None:
        sys.setswitchinterval(SWITCH_S)
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

    def serve(self, fd: int, on_readable: Callable[[], Turn], on_writable: Callable[[], None]) -> None:
        """Call ``on_readable`` whenever ``fd`` has something (data, its end, an error). It is a newcomer:
        while many of them have something, the others come first."""
        self._data.serve(fd, on_readable, on_writable)

    def call_before_waiting(self, callback: Callable[[], None]) -> None:
        """Call once when all that can be done now has been: what gathers work hands it on there. Cheaper than
        ``call_soon``, which ends the turn of the connections."""
        self._data.before_waiting.append(callback)

    def promote(self, fd: int) -> None:
        """No newcomer any more."""
        self._data.promote(fd)

    def again(self, fd: int) -> None:
        """Call ``on_readable`` in the turn of this connection, whether anything comes or not."""
        self._data.again(fd)

    def want(self, fd: int, *, read: bool, write: bool) -> None:
        """What to be called for from now on."""
        self._data.want(fd, read=read, write=write)

    def forget(self, fd: int) -> None:
        """No longer; call before the descriptor is closed."""
        self._data.forget(fd)
