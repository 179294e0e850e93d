"""The buckets behind the I/O limits, against a clock that a test moves."""

from collections.abc import Callable

import pytest

from targetd.engine.throttle import BURST_S, Throttle


class Clock:
    """What a throttle uses of an event loop."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, call: Callable[[], None]) -> "Clock.Timer":
        timer = (self.now + delay_s, call)
        self.timers.append(timer)
        return Clock.Timer(self, timer)

    class Timer:
        def __init__(self, clock: "Clock", timer: tuple[float, Callable[[], None]]) -> None:
            self.clock, self.timer = clock, timer

        def cancel(self) -> None:
            self.clock.timers.remove(self.timer)

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self.timers and min(self.timers)[0] <= until:
            at, call = min(self.timers, key=lambda timer: timer[0])
            self.timers.remove((at, call))
            self.now = at
            call()
        self.now = until


def drain(throttle: Throttle, length: int = 4096) -> int:
    count = 0
    while throttle.take(length):
        count += 1
    return count


@pytest.mark.parametrize("rate", [1, 100, 5000])
def test_the_average_holds_and_the_burst_is_what_it_says(rate: int) -> None:
    clock, done = Clock(), 0

    def released() -> None:
        nonlocal done
        done += drain(throttle)

    throttle = Throttle(rate, 0, released, clock)  # type: ignore[arg-type]
    done = drain(throttle)
    assert done == pytest.approx(rate * BURST_S, abs=1)
    clock.advance(60)
    assert done == pytest.approx(rate * (60 + BURST_S), rel=0.02, abs=2)


def test_bytes_are_counted_and_a_large_command_is_late_not_stuck() -> None:
    clock, done = Clock(), 0

    def released() -> None:
        nonlocal done
        done += drain(throttle, 1 << 20)

    throttle = Throttle(0, 100_000, released, clock)  # type: ignore[arg-type]
    done = drain(throttle, 1 << 20)
    assert done == 1, "larger than the burst, and let go all the same"
    clock.advance(105)
    assert done == pytest.approx(11, abs=1)


def test_both_limits_hold() -> None:
    clock = Clock()
    throttle = Throttle(1000, 40960, lambda: None, clock)  # type: ignore[arg-type]
    assert drain(throttle) == 20
    assert throttle.exhausted


def test_new_limits_count_from_now_on() -> None:
    clock, released = Clock(), []
    throttle = Throttle(10, 0, lambda: released.append(clock.now), clock)  # type: ignore[arg-type]
    drain(throttle)
    assert len(clock.timers) == 1
    throttle.change(1000, 0)
    assert throttle.limits == (1000, 0)
    clock.advance(1)
    assert drain(throttle) == pytest.approx(1000, rel=0.02)
    throttle.change(0, 1 << 20)
    assert throttle.take(4096)
    throttle.close()
    assert not clock.timers


def test_one_timer_at_a_time() -> None:
    clock = Clock()
    throttle = Throttle(1, 0, lambda: None, clock)  # type: ignore[arg-type]
    for _ in range(100):
        throttle.take(512)
    assert len(clock.timers) == 1


# -- what takes its share on a worker ------------------------------------------------------------------


def test_a_worker_waits_until_there_is_something_in_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    throttle = Throttle(0, 1 << 20, lambda: None, clock)  # type: ignore[arg-type]
    monkeypatch.setattr("time.sleep", clock.advance)
    begin = clock.now
    for _ in range(80):
        assert throttle.spend(throttle.piece_bytes, lambda: False)
    moved = 80 * throttle.piece_bytes
    assert clock.now - begin == pytest.approx(moved / (1 << 20) - BURST_S, rel=0.05)


def test_a_worker_that_waits_hears_that_nobody_wants_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    throttle = Throttle(0, 1 << 20, lambda: None, clock)  # type: ignore[arg-type]
    monkeypatch.setattr("time.sleep", clock.advance)
    assert throttle.spend(1 << 30, lambda: False)
    asked: list[bool] = []
    assert not throttle.spend(1, lambda: asked.append(True) or len(asked) > 3)
    assert len(asked) == 4


def test_a_worker_that_waits_goes_on_when_the_limits_are_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    throttle = Throttle(0, 1 << 20, lambda: None, clock)  # type: ignore[arg-type]
    assert throttle.spend(1 << 40, lambda: False)
    monkeypatch.setattr("time.sleep", lambda seconds: throttle.change(0, 0))
    assert throttle.spend(1, lambda: False)
    assert throttle.piece_bytes == 0


@pytest.mark.parametrize(("rate", "piece"), [(1, 65536), (1 << 20, 1 << 18), (1 << 30, 1 << 28), (0, 0)])
def test_pieces_leave_room_for_others(rate: int, piece: int) -> None:
    assert Throttle(0, rate, lambda: None, Clock()).piece_bytes == piece  # type: ignore[arg-type]
