"""A machine that runs the daemon loses its power in the middle of verified writes (``power.py``).

What was answered as durable is there after the next boot, every block is old or new and whole, and so is the
configuration.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest import image
from tests.guest.machine import COMMAND
from tests.guest.power import FILES
from tests.guest.ways import Choice

pytestmark = [pytest.mark.guest]

CUTS = int(os.environ.get("GUEST_CUTS") or 5)
CUT_LIMIT_S = 900.0


@pytest.mark.timeout((CUTS + 1) * CUT_LIMIT_S + image.BUILD_LIMIT_S)
def test_power_cut_during_verified_writes(guest_root: Path, guest_choice: Choice, tmp_path: Path) -> None:
    """``GUEST_CUTS`` of them, 5 unless told; each during writes to every disk at once."""
    ran = subprocess.run(
        [
            *COMMAND,
            *(sys.executable, "-m", "tests.guest.power"),
            *("--root", str(guest_root), "--choice", guest_choice.place),
            *("--directory", str(tmp_path), "--cuts", str(CUTS)),
        ],
        cwd=image.ROOT,
        env={**os.environ, "PYTHONPATH": str(image.ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:]
    judged = [line for line in ran.stdout.splitlines() if line.startswith("CUT ")]
    assert len(judged) == CUTS + 1
    assert all(f"{FILES + 1} disks" in line for line in judged)
