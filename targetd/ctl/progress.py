"""Bars for what takes its time, on a terminal: read from ``services/iscsi/work/`` until it is over."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from targetd.ctl.client import Client
from targetd.system.logs import clean

__all__ = ["during", "watch"]

PATH = "services/iscsi/work"
INTERVAL_S = 0.25
_T = TypeVar("_T")


class _Bars:
    """One bar for each piece of work."""

    def __init__(self, client: Client, progress: Progress) -> None:
        self._client = client
        self._progress = progress
        self._tasks: dict[tuple[str, int], TaskID] = {}

    def look(self) -> int:
        """Draw what is under way; how much that is. What is there no more has come to its end."""
        found: dict[tuple[str, int], dict[str, Any]] = {
            (one["kind"], one["extent_id"]): one for one in self._client.all(PATH)
        }
        for key, one in found.items():
            if key not in self._tasks:
                self._tasks[key] = self._progress.add_task(clean(f"{one['kind']} {one['extent']}"))
            self._progress.update(self._tasks[key], completed=one["done"], total=one["total"])
        for key in self._tasks.keys() - found.keys():
            self.end(self._tasks.pop(key))
        return len(found)

    def end(self, task: TaskID) -> None:
        """Fill a bar."""
        self._progress.update(task, completed=self._progress.tasks[task].total)


def _drawn() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


def during(watcher: Client, work: Callable[[], _T]) -> _T:
    """What ``work`` returns or raises, with bars while it lasts.

    Args:
        watcher: a connection of its own; the work has another.
    """
    over = threading.Event()
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    # Not joined when the user gives up: the daemon goes on with it all the same.
    threading.Thread(target=run, daemon=True).start()
    if not over.wait(INTERVAL_S):
        with _drawn() as progress:
            bars = _Bars(watcher, progress)
            while not over.wait(INTERVAL_S):
                bars.look()
            bars.look()
    if errors:
        raise errors[0]
    return results[0]


def watch(client: Client) -> None:
    """Bars until nothing is under way."""
    with _drawn() as progress:
        bars = _Bars(client, progress)
        while bars.look():
            time.sleep(INTERVAL_S)
