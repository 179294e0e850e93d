"""Running system peers: which are there, and commands with a time limit whose output is kept."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMAND_LIMIT_S = 60.0


@dataclass(frozen=True)
class Ran:
    """A command that ended."""

    command: str
    status: int
    output: str
    """Standard output and standard error, as they came."""

    def ok(self) -> str:
        """The output of a command that must have succeeded."""
        assert self.status == 0, f"{self.command}: exit status {self.status}\n{self.output}"
        return self.output

    def refused(self, *parts: str) -> str:
        """The output of a command that must have failed and said why."""
        assert self.status != 0, f"{self.command}: succeeded\n{self.output}"
        for part in parts:
            assert part in self.output, f"{self.command}: no {part!r} in\n{self.output}"
        return self.output


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skip where a tool is not installed, and say which."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(
    *argv: str,
    limit_s: float = COMMAND_LIMIT_S,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Ran:
    """Run to the end, in ``directory`` if given. A command still running at its limit is killed and fails
    the test."""
    command = " ".join(argv)
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
            cwd=directory,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(
            f"{command}: no end within {limit_s} s\n{(late.output or b'').decode('utf-8', 'replace')}"
        )
    return Ran(command, done.returncode, done.stdout.decode("utf-8", "replace"))
