"""Worker lanes: what their threads keep."""

import asyncio
import errno
import threading
import weakref
from functools import partial

import pytest

from targetd.engine import media_probe
from targetd.system import threads as lanes
from targetd.system.threads import Completions, WorkerThreads

LIMIT_S = 10.0


class Data:
    """Of a WRITE, say."""


async def test_a_thread_at_rest_keeps_nothing_of_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "IDLE_S", 100 * LIMIT_S)
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    lane = WorkerThreads(Completions(loop, lambda: None), "test")
    data = Data()
    weakref.finalize(data, loop.call_soon_threadsafe, gone.set)
    lane.run(partial(id, data), lambda result: None)
    del data
    await asyncio.wait_for(gone.wait(), LIMIT_S)
    lane.close()


async def test_long_work_and_flushes_leave_threads_for_short_work() -> None:
    """However many commands there are that take long, and however long a flush does."""
    loop = asyncio.get_running_loop()
    lane = WorkerThreads(Completions(loop, lambda: None), "test")
    gate = threading.Event()
    ended: list[bool] = []
    all_done = asyncio.Event()

    def one_more(result: bool) -> None:
        ended.append(result)
        if len(ended) == 100:
            all_done.set()

    for _ in range(50):
        lane.long.run(gate.wait, one_more)
        lane.flushes.run(gate.wait, one_more)
    done = asyncio.Event()
    lane.run(lambda: None, lambda result: done.set())
    try:
        await asyncio.wait_for(done.wait(), LIMIT_S)
        assert not ended
        assert lane.depth >= 100 - lanes.LONG_WIDTH - 1
    finally:
        gate.set()
    await asyncio.wait_for(all_done.wait(), LIMIT_S)
    lane.close()


# -- A moment without threads --------------------------------------------------------------------------


class Shortage:
    """No thread can be started while it lasts, as when pids.max of the cgroup is reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.over = False
        self.refused = asyncio.Event()
        loop = asyncio.get_running_loop()
        start = threading.Thread.start

        def start_or_not(thread: threading.Thread) -> None:
            if not self.over:
                loop.call_soon_threadsafe(self.refused.set)
                raise error
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_not)


NO_THREAD = [RuntimeError("can't start new thread"), MemoryError()]


@pytest.mark.parametrize("error", NO_THREAD)
async def test_a_lane_works_again_when_threads_can_be_had_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """However often it asked meanwhile; what was queued is done, in order."""
    lane = WorkerThreads(Completions(asyncio.get_running_loop(), lambda: None), "test")
    shortage = Shortage(monkeypatch, error)
    done: list[int] = []
    over = asyncio.Event()
    for number in range(2 * lanes.WIDTH):
        lane.run(partial(int, number), done.append)
    lane.run(lambda: None, lambda result: over.set())
    await asyncio.wait_for(shortage.refused.wait(), LIMIT_S)
    shortage.over = True
    await asyncio.wait_for(over.wait(), LIMIT_S)
    assert done == list(range(2 * lanes.WIDTH))
    lane.close()


@pytest.mark.parametrize("error", NO_THREAD)
async def test_other_work_waits_for_a_thread_too(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    shortage = Shortage(monkeypatch, error)
    work = asyncio.ensure_future(lanes.run_in_thread(int, "7"))
    await asyncio.wait_for(shortage.refused.wait(), LIMIT_S)
    shortage.over = True
    assert await asyncio.wait_for(work, LIMIT_S) == 7


async def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "PATIENCE_S", 0.0)
    Shortage(monkeypatch, MemoryError())
    with pytest.raises(OSError, match="no thread could be started") as refusal:
        await lanes.run_in_thread(int, "7")
    assert refusal.value.errno == errno.EAGAIN


async def test_media_are_probed_again_when_threads_can_be_had_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_probe, "HANG_S", 0.01)
    loop = asyncio.get_running_loop()
    probe = media_probe.MediaProbe(loop, Completions(loop, lambda: None))
    shortage = Shortage(monkeypatch, RuntimeError("can't start new thread"))
    probed = asyncio.Event()
    probe.add([(lambda: None, lambda result: probed.set())])
    await asyncio.wait_for(shortage.refused.wait(), LIMIT_S)
    shortage.over = True
    await asyncio.wait_for(probed.wait(), LIMIT_S)


async def test_a_thread_survives_work_that_fails_in_a_way_nobody_foresaw(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lane = WorkerThreads(Completions(asyncio.get_running_loop(), lambda: None), "test", 1)
    over = asyncio.Event()
    lane.run(lambda: 1 // 0, lambda result: None)
    lane.run(lambda: None, lambda result: over.set())
    await asyncio.wait_for(over.wait(), LIMIT_S)
    assert "ZeroDivisionError" in caplog.text
    lane.close()
