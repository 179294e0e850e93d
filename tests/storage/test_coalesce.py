"""Flushes that overlap share the next run, and each is covered by one that started after it."""

import contextlib
import errno
import gc
import queue
import threading
import weakref
from collections.abc import Callable

import pytest

from storage.coalesce import Coalescer


class Stepped:
    """An action that stops in the middle of each run until it is let on."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.runs = 0
        self.errors: list[OSError | None] = []

    def __call__(self) -> None:
        self.runs += 1
        self.started.release()
        assert self.go_on.acquire(timeout=10)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error


class Caller(threading.Thread):
    """One call of ``run``; ``outcome`` says how it ended."""

    def __init__(self, coalescer: Coalescer) -> None:
        super().__init__(daemon=True)
        self.coalescer = coalescer
        self.outcome: OSError | str = "not yet"
        self.start()

    def run(self) -> None:
        try:
            self.coalescer.run()
        except OSError as error:
            self.outcome = error
        else:
            self.outcome = "done"


def waiting(coalescer: Coalescer, count: int) -> None:
    """Return when so many callers wait for a run that is not theirs."""
    while True:
        with coalescer._changed:
            if len(coalescer._changed._waiters) == count:  # type: ignore[attr-defined]
                return


def test_callers_during_a_run_share_the_next_one() -> None:
    action = Stepped()
    coalescer = Coalescer(action)
    first = Caller(coalescer)
    assert action.started.acquire(timeout=10)
    others = [Caller(coalescer) for _ in range(5)]
    waiting(coalescer, 5)
    action.go_on.release()
    first.join(10)
    assert first.outcome == "done"
    assert action.started.acquire(timeout=10)
    assert [caller.outcome for caller in others] == ["not yet"] * 5
    action.go_on.release()
    for caller in others:
        caller.join(10)
    assert [caller.outcome for caller in others] == ["done"] * 5
    assert action.runs == 2


def test_everyone_whom_a_failed_run_covered_learns_of_it_and_nobody_else() -> None:
    action = Stepped()
    action.errors = [None, OSError(errno.EIO, "lost"), None]
    coalescer = Coalescer(action)
    first = Caller(coalescer)
    assert action.started.acquire(timeout=10)
    covered = [Caller(coalescer) for _ in range(3)]
    waiting(coalescer, 3)
    action.go_on.release()
    assert action.started.acquire(timeout=10)
    late = Caller(coalescer)
    action.go_on.release()
    assert action.started.acquire(timeout=10)
    action.go_on.release()
    for caller in (first, *covered, late):
        caller.join(10)
    assert first.outcome == late.outcome == "done"
    errors = [caller.outcome for caller in covered]
    assert [error.errno for error in errors if isinstance(error, OSError)] == [errno.EIO] * 3
    assert len({id(error) for error in errors}) == 3


def test_an_unexpected_end_of_a_run_leaves_no_one_waiting() -> None:
    calls = iter([ValueError("bug"), None])

    def action() -> None:
        error = next(calls)
        if error is not None:
            raise error

    coalescer = Coalescer(action)
    with pytest.raises(ValueError, match="bug"):
        coalescer.run()
    coalescer.run()


def test_a_failed_run_keeps_nothing_alive() -> None:
    """A device whose last flush failed stayed claimed after its extent was deleted, until the next garbage
    collection: the error kept was its own traceback's captive, and the descriptor with it."""

    class Descriptor:
        pass

    used: list[weakref.ref[Descriptor]] = []

    def fail() -> None:
        descriptor = Descriptor()
        used.append(weakref.ref(descriptor))
        raise OSError(errno.EIO, "lost")

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(OSError):
            Coalescer(fail).run()
        assert used[0]() is None
    finally:
        gc.enable()


class Loop:
    """The event loop's side: begins the action when asked to, and hears of ends. ``posted`` is what threads
    want called there."""

    def __init__(self, coalescer: Coalescer) -> None:
        self.coalescer = coalescer
        self.begun: list[Callable[[OSError | None], None]] = []
        self.heard: list[OSError | None] = []
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def begin(self) -> None:
        self.coalescer.begin(self.begun.append, self.posted.put, self.heard.append)

    def serve(self) -> None:
        self.posted.get(timeout=10)()


def test_who_begins_during_a_run_shares_the_next_one_and_its_error() -> None:
    loop = Loop(Coalescer(Stepped()))
    for _ in range(4):
        loop.begin()
    assert len(loop.begun) == 1 and not loop.heard
    loop.begun[0](None)
    assert loop.heard == [None] and len(loop.begun) == 2
    error = OSError(errno.EIO, "lost")
    loop.begun[1](error)
    assert loop.heard == [None, error, error, error] and len(loop.begun) == 2
    loop.begin()
    assert len(loop.begun) == 3


def test_threads_and_the_event_loop_share_runs_whoever_began_them() -> None:
    action = Stepped()
    coalescer = Coalescer(action)
    loop = Loop(coalescer)
    # a thread runs; what begins meanwhile is begun on the loop when that has ended
    first = Caller(coalescer)
    assert action.started.acquire(timeout=10)
    loop.begin()
    assert not loop.begun
    action.go_on.release()
    first.join(10)
    loop.serve()
    assert first.outcome == "done" and len(loop.begun) == 1 and not loop.heard
    # the loop's runs; threads that come meanwhile are covered by the next, with whoever begins
    threads = [Caller(coalescer) for _ in range(2)]
    waiting(coalescer, 2)
    loop.begin()
    loop.begun[0](None)
    assert loop.heard == [None] and len(loop.begun) == 2
    loop.begun[1](OSError(errno.ENOSPC, "full"))
    for thread in threads:
        thread.join(10)
        assert isinstance(thread.outcome, OSError) and thread.outcome.errno == errno.ENOSPC
    assert [error and error.errno for error in loop.heard] == [None, errno.ENOSPC]
    assert action.runs == 1


def test_a_thread_tells_the_event_loop_of_the_run_that_covers_both() -> None:
    action = Stepped()
    coalescer = Coalescer(action)
    loop = Loop(coalescer)
    loop.begin()
    thread = Caller(coalescer)
    waiting(coalescer, 1)
    loop.begun[0](None)  # nobody on the loop waits for the next: the thread runs it
    assert action.started.acquire(timeout=10)
    action.go_on.release()
    thread.join(10)
    assert thread.outcome == "done" and action.runs == 1 and loop.posted.empty()
