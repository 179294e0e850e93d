"""Running ``zfs`` and ``zpool``: the one place that does, for volumes as media and for pools in the API.

A command is looked for in the absolute directories of PATH and where systems keep it, never in the current
directory (an empty or relative entry of PATH means that one, CWE-427), and runs in ``/``. It never asks: its
standard input is empty. On a suspended pool it does not come back, so it has a time limit, and is to be run
on a worker thread.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

__all__ = ["find_command", "run_command"]

ALWAYS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where ``zfs`` is when PATH is a service's or a user's."""


def _path() -> str:
    given = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*(entry for entry in given if entry.startswith("/")), *ALWAYS])


def find_command(name: str) -> str | None:
    """The absolute path of ``zfs`` or ``zpool``; None: it is not installed."""
    return shutil.which(name, path=_path())


def run_command(command: Sequence[str], timeout_s: float | None) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end and hand back its exit status and what it printed, in English.

    Raises:
        FileNotFoundError: it is not installed.
        subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    found = find_command(command[0])
    if found is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    return subprocess.run(
        [found, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd="/",
        env={**os.environ, "PATH": _path(), "LC_ALL": "C"},
    )
