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
