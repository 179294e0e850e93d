"""Flushes that overlap share the next run, and each is covered by one that started after it."""

import contextlib
import errno
import gc
import threading
import weakref

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
