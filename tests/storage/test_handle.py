"""Claims: one medium, one daemon."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage import handle
from storage.file import File

ROOT = Path(__file__).parents[2]

OPEN_AND_WAIT = """
import sys
from storage.file import File
extent = File(sys.argv[1], read_only=sys.argv[2] == "ro")
print("open", flush=True)
sys.stdin.read()
"""


class OtherDaemon:
    """Another process that has a file open as an extent."""

    def __init__(self, path: Path, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_WAIT, str(path), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "open\n"

    def stop(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "CLAIM_PATIENCE_S", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(bytes(65536))
    return file


@pytest.mark.parametrize(
    ("theirs", "ours", "allowed"),
    [("rw", "rw", False), ("rw", "ro", False), ("ro", "rw", False), ("ro", "ro", True)],
)
def test_a_file_that_one_daemon_writes_is_no_one_elses(
    path: Path, theirs: str, ours: str, allowed: bool
) -> None:
    other = OtherDaemon(path, theirs)
    try:
        if allowed:
            File(str(path), read_only=True)
        else:
            with pytest.raises(OSError, match="another process") as caught:
                File(str(path), read_only=ours == "ro")
            assert caught.value.errno == errno.EBUSY
            assert caught.value.filename == str(path)
    finally:
        other.stop()
    File(str(path), read_only=ours == "ro")


def test_the_claim_ends_with_the_extent_even_while_a_reply_is_leaving(path: Path) -> None:
    extent = File(str(path))
    view = extent.read_nowait(0, 4096)
    assert view is not None
    extent.close()
    OtherDaemon(path, "rw").stop()
    assert len(view) == 4096


def test_one_daemon_may_open_a_file_anew_before_closing_it(path: Path) -> None:
    """A changed extent is prepared before the old one is closed."""
    old = File(str(path), read_only=True)
    new = File(str(path), 131072)
    old.close()
    probe = subprocess.run(
        [sys.executable, "-c", OPEN_AND_WAIT, str(path), "ro"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "another process" in probe.stderr
    new.close()
    OtherDaemon(path, "rw").stop()


def test_the_descriptor_closes_with_its_last_user(path: Path) -> None:
    opened, _ = handle.open_file(str(path), writable=True)
    fd = opened.fd
    user = opened
    del opened
    os.fstat(fd)
    del user
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
