"""The patrol: quick jobs on one thread, and a job that hangs holds no other."""

import asyncio
import threading

from targetd.engine.media_probe import MediaProbe
from targetd.system.threads import Completions


async def test_jobs_are_done_in_order_by_one_thread() -> None:
    loop = asyncio.get_running_loop()
    patrol = MediaProbe(loop, Completions(loop, lambda: None))
    seen: list[tuple[int, int]] = []
    over = asyncio.Event()

    def done(number: int, thread: int) -> None:
        seen.append((number, thread))
        if len(seen) == 100:
            over.set()

    patrol.add(
        (lambda n=n: (n, threading.get_ident()), lambda result: done(*result))  # type: ignore[misc]
        for n in range(100)
    )
    await asyncio.wait_for(over.wait(), 10)
    assert [number for number, _ in seen] == list(range(100))
    assert len({thread for _, thread in seen}) == 1


async def test_a_job_that_hangs_holds_no_other_and_ends_late() -> None:
    loop = asyncio.get_running_loop()
    patrol = MediaProbe(loop, Completions(loop, lambda: None))
    gates = [threading.Event() for _ in range(2)]
    ended: asyncio.Queue[str] = asyncio.Queue()
    for index, gate in enumerate(gates):
        patrol.add([(gate.wait, lambda _, index=index: ended.put_nowait(f"late {index}"))])
    patrol.add([(lambda: "quick", ended.put_nowait)])
    assert await asyncio.wait_for(ended.get(), 20) == "quick"
    assert not patrol.waiting
    for index, gate in enumerate(gates):
        gate.set()
        assert await asyncio.wait_for(ended.get(), 20) == f"late {index}"
    patrol.add([(lambda: "again", ended.put_nowait)])
    assert await asyncio.wait_for(ended.get(), 20) == "again"
