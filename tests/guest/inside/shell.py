"""Commands of the guest with a time limit, and waiting for what comes by itself."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tests.guest.inside.checks import CheckFailedError

T = TypeVar("T")
COMMAND_LIMIT_S = 400.0
WAIT_LIMIT_S = 120.0
"""Both many times what a quiet machine takes: they end what hangs, and decide nothing else."""
BLOCK = 4096
TEXT_LIMIT = 3000
"""How much of a command's output goes into a report."""


@dataclass(frozen=True)
class Ran:
    """A command that ended."""

    command: str
    status: int
    output: str
    """Standard output and standard error, as they came."""

    def __str__(self) -> str:
        shown = self.output if len(self.output) <= TEXT_LIMIT else "…" + self.output[-TEXT_LIMIT:]
        return f"{self.command}: exit status {self.status}\n{shown}"

    def refused(self, *parts: str) -> str:
        """The output of a command that must have failed, saying every one of ``parts``."""
        if self.status == 0 or any(part not in self.output for part in parts):
            raise CheckFailedError(f"meant to be refused with {parts}: {self}")
        return self.output


def attempt(*argv: object, limit_s: float = COMMAND_LIMIT_S, stdin: bytes = b"") -> Ran:
    """Run to the end, whatever the end. CheckFailedError if it has not come after ``limit_s``."""
    words = [str(word) for word in argv]
    command = " ".join(words)
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        shown = (late.output or b"").decode("utf-8", "replace")[-TEXT_LIMIT:]
        raise CheckFailedError(f"{command}: no end within {limit_s} s\n{shown}") from None
    return Ran(command, done.returncode, done.stdout.decode("utf-8", "replace"))


def run(*argv: object, limit_s: float = COMMAND_LIMIT_S, stdin: bytes = b"") -> str:
    """The output of a command that must succeed."""
    ran = attempt(*argv, limit_s=limit_s, stdin=stdin)
    if ran.status != 0:
        raise CheckFailedError(str(ran))
    return ran.output


def until(what: str, found: Callable[[], T | None], limit_s: float = WAIT_LIMIT_S) -> T:
    """The first result that is not None, False or empty; CheckFailedError, naming ``what``, if none comes.

    For what the kernel or its daemons do in their own time and give no notice of.
    """
    deadline = time.monotonic() + limit_s
    while True:
        result = found()
        if result:
            return result
        if time.monotonic() > deadline:
            raise CheckFailedError(f"not within {limit_s} s: {what}")
        time.sleep(0.05)


class Background:
    """A command that runs beside what a check does meanwhile."""

    def __init__(self, *argv: object) -> None:
        self.command = " ".join(map(str, argv))
        self.process = subprocess.Popen(
            list(map(str, argv)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self._kill()
            self.process.communicate()

    def _kill(self) -> None:
        """It and its children, which would hold the pipe."""
        os.killpg(self.process.pid, signal.SIGKILL)

    def running(self) -> bool:
        return self.process.poll() is None

    def ended(self, limit_s: float = COMMAND_LIMIT_S) -> str:
        """Its output; CheckFailedError unless it ends well within ``limit_s``."""
        try:
            output = self.process.communicate(timeout=limit_s)[0].decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            self._kill()
            output = self.process.communicate()[0].decode("utf-8", "replace")
            raise CheckFailedError(
                f"{self.command}: no end within {limit_s} s\n{output[-TEXT_LIMIT:]}"
            ) from None
        if self.process.returncode != 0:
            raise CheckFailedError(str(Ran(self.command, self.process.returncode, output)))
        return output
