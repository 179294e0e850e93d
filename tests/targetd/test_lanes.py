"""Worker lanes: what their threads keep."""

import asyncio
import weakref
from functools import partial

import pytest

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
