"""Jobs: calls that take longer than an answer, with progress and events (``core.get_jobs``)."""

import asyncio
import errno
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from api.v2.errors import ArgumentsError, CallError

__all__ = ["COLLECTION", "Job", "Jobs"]

COLLECTION: Final = "core.get_jobs"
"""What callers subscribe to."""
KEPT: Final = 1000
"""Jobs that are over and still shown."""
RUNNING: Final = 50
"""Jobs under way at the most."""

State = Literal["RUNNING", "SUCCESS", "FAILED", "ABORTED"]
Listener = Callable[[str, dict[str, Any]], Awaitable[None]]
"""Takes ``added`` or ``changed``, and the job."""


@dataclass(slots=True)
class Job:
    """One of them."""

    id: int
    method: str
    arguments: Sequence[Any]
    state: State = "RUNNING"
    percent: float = 0
    description: str = ""
    result: Any = None
    error: str | None = None
    fields: Sequence[tuple[str, str, int]] | None = None
    """What is wrong with the arguments, if that is why it failed."""
    started: float = field(default_factory=time.time)
    finished: float | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    def show(self) -> dict[str, Any]:
        """As TrueNAS has it."""
        return {
            "id": self.id,
            "method": self.method,
            "arguments": list(self.arguments),
            "state": self.state,
            "progress": {"percent": int(self.percent), "description": self.description, "extra": None},
            "result": self.result,
            "error": self.error,
            "exception": self.error,
            "exc_info": self._failure(),
            "abortable": True,
            "transient": False,
            "time_started": {"$date": int(self.started * 1000)},
            "time_finished": None if self.finished is None else {"$date": int(self.finished * 1000)},
        }

    def _failure(self) -> dict[str, Any] | None:
        if self.error is None:
            return None
        kind = "CallError" if self.fields is None else "VALIDATION"
        return {"type": kind, "extra": self.fields and [list(one) for one in self.fields], "repr": self.error}


class Jobs:
    """All jobs of this process. Lives on the event loop."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._last = 0
        self.listeners: set[Listener] = set()

    def list(self) -> "list[Job]":
        """Oldest first."""
        return [*self._jobs.values()]

    def find(self, id: int) -> Job:
        """One of them.

        Raises:
            CallError: ENOENT.
        """
        job = self._jobs.get(id)
        if job is None:
            raise CallError(f"there is no job {id}", errno.ENOENT)
        return job

    async def start(
        self, method: str, arguments: Sequence[Any], work: Callable[[Job], Awaitable[Any]]
    ) -> Job:
        """Begin a job and return while it is under way.

        Raises:
            CallError: EBUSY, too many are.
        """
        if sum(job.state == "RUNNING" for job in self._jobs.values()) >= RUNNING:
            raise CallError(f"{RUNNING} jobs are under way; wait until one has ended", errno.EBUSY)
        self._last += 1
        job = self._jobs[self._last] = Job(self._last, method, arguments)
        while len(self._jobs) > KEPT:
            oldest = next((one for one in self._jobs.values() if one.state != "RUNNING"), None)
            if oldest is None:
                break
            del self._jobs[oldest.id]
        await self._tell("added", job)
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        return job

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[Any]]) -> None:
        try:
            job.result = await work(job)
            job.state, job.percent = "SUCCESS", 100
        except asyncio.CancelledError:
            job.state, job.error = "ABORTED", "[ECANCELED] aborted"
        except ArgumentsError as error:
            job.state, job.error, job.fields = "FAILED", error.reason, error.errors
        except CallError as error:
            job.state, job.error = "FAILED", error.reason
        except Exception as error:
            job.state, job.error = "FAILED", f"[EFAULT] {error}"
        job.finished = time.time()
        job.over.set()
        await self._tell("changed", job)

    async def progress(self, job: Job, percent: float, description: str) -> None:
        """Say how far a job is."""
        job.percent, job.description = percent, description
        await self._tell("changed", job)

    async def _tell(self, what: str, job: Job) -> None:
        for listener in list(self.listeners):
            await listener(what, job.show())

    def abort(self, id: int) -> None:
        """End a job that is under way; nothing for one that is over."""
        job = self.find(id)
        if job.task is not None:
            job.task.cancel()

    async def close(self) -> None:
        """End all that are under way."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
