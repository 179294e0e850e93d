"""``scripts/environment``: a .venv that was interrupted is made anew. By a stand-in for Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "environment"

PYTHON = """#!/bin/sh
case "$*" in
    *"-m venv .venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/pip && echo made >>log ;;
    *"-m pip"*) [ -e .venv/pip ] ;;
    *print*) echo the same ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)
    return tmp_path


def make(checkout: Path) -> int:
    """How often a .venv has been made by now."""
    environment = {**os.environ, "PYTHON": str(checkout / "python3")}
    subprocess.run([checkout / "scripts" / "environment"], env=environment, check=True, capture_output=True)
    return (checkout / "log").read_text().count("made")


def test_a_whole_one_is_kept(checkout: Path) -> None:
    assert (make(checkout), make(checkout)) == (1, 1)


@pytest.mark.parametrize("left", [("made", "installed", "pip"), ("made", "installed"), ("pip",)])
def test_a_half_made_one_is_made_anew(checkout: Path, left: tuple[str, ...]) -> None:
    """An interpreter and no pip; an interpreter, and files of pip as far as they had been copied."""
    make(checkout)
    for name in left:
        (checkout / ".venv" / name).unlink()
    assert (make(checkout), make(checkout)) == (2, 2)


def test_one_that_was_made_before_there_was_a_mark_is_kept(checkout: Path) -> None:
    make(checkout)
    (checkout / ".venv" / "made").unlink()
    assert make(checkout) == 1
