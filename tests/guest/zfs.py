"""A kernel with ZFS for an emulated PC, compiled once and kept beside the roots.

Debian has ZFS as source alone (``zfs-dkms``). It is compiled by this machine and not in the emulation,
against the headers of Debian's kernel: four minutes on two processors, half of them for
the configure script. So it is begun with the tests, at a low priority, and waited for by the last of them.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Final

from tests.guest import image

RECIPE: Final = Path(__file__).with_name("zfs.sh")
PACKAGES: Final = (
    "busybox-static",
    "gcc",
    "kmod",
    "libc6-dev",
    "linux-headers-amd64",
    "make",
)
LIMIT_S: Final = 3000.0
"""Of a build that is the last of all that want a processor."""
PRIORITY: Final = 15
"""nice(1)."""


def _make(directory: Path) -> None:
    began = time.monotonic()
    builder = directory.with_name(f"{directory.name}.builder")
    try:
        said = image.bootstrap(builder, PACKAGES, str(RECIPE), LIMIT_S)
        (builder / "out").rename(directory)
    finally:
        shutil.rmtree(builder, ignore_errors=True)
    lines = [line for line in said.splitlines() if line.startswith("took ")]
    print(*lines, f"took all: {time.monotonic() - began:.0f} s", sep="\n", flush=True)


def built() -> Path:
    """A directory with ``vmlinuz``, ``initramfs`` and, below ``modules``, ``usr/lib/modules``. Made now if it
    is not there. Raises UnavailableError."""
    image.require_host()
    recipes = [file.read_text(encoding="utf-8") for file in (RECIPE, image.INITRAMFS)]
    return image.kept("zfs", "\n".join([image.suite(), *recipes, *PACKAGES]), _make)


class Build:
    """``built`` in a process of its own, beside the tests."""

    def __init__(self) -> None:
        self._said = ""
        self._process = subprocess.Popen(
            ["nice", "-n", str(PRIORITY), sys.executable, "-m", "tests.guest.zfs"],
            cwd=image.ROOT,
            env={**os.environ, "PYTHONPATH": str(image.ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> Path:
        """Until it has ended. As ``built``."""
        self._said += self._process.communicate()[0].decode("utf-8", "replace")
        if self._process.returncode != 0:
            raise image.UnavailableError(f"no kernel with ZFS: {self._said[-2000:]}")
        return Path(self._said.splitlines()[-1])

    def stop(self) -> None:
        """If it is still at work, nobody needs it any more; what it began is removed."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.communicate()


def _end(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    signal.signal(signal.SIGTERM, _end)
    print(built())


if __name__ == "__main__":
    main()
