"""What waits for a disk is done by the kernel where it may, by threads where it may not, and that is said."""

import errno
import os
import sys
from pathlib import Path

import pytest

from tests.daemon import Daemon, DaemonError
from tests.faults.kit import lun_of, pattern

REFUSE = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
# seccomp(2): io_uring_setup, 425 on every machine, fails with EPERM; all else is allowed
code = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 425, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""As the seccomp profiles of containers do it, then what was to be started."""

REFUSING = (sys.executable, "-c", REFUSE)
assert errno.EPERM == 1


def daemon_with(engine: str, directory: Path) -> Daemon:
    return Daemon(directory, options=("--io-engine", engine))


def use(daemon: Daemon) -> dict[str, object]:
    """Cold reads, a durable write and a flush; then what the statistics say."""
    disk = daemon.create_disk("disk", "8MB")
    with lun_of(daemon, disk) as lun:
        assert lun.write(0, pattern(1, 2048)).good
        assert lun.flush().good
        fd = os.open(disk.path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        for lba in range(0, 2048, 256):
            assert lun.read(lba, 8).data == pattern(1 + lba, 8)
        assert lun.write(64, pattern(7, 8), fua=True).good
        assert lun.flush().good
        assert lun.read(60, 16).data == pattern(61, 4) + pattern(7, 8) + pattern(73, 4)
    return daemon.expect(200, "GET", "services/iscsi/statistics/")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("engine", "launcher", "taken", "reason"),
    [
        ("threads", (), "threads", "as --io-engine says"),
        ("auto", REFUSING, "threads", "it is forbidden"),
        ("auto", (), "uring", ""),
    ],
    ids=["threads", "refused", "uring"],
)
def test_the_engine_is_chosen_and_told(
    tmp_path: Path, engine: str, launcher: tuple[str, ...], taken: str, reason: str
) -> None:
    daemon = daemon_with(engine, tmp_path)
    try:
        daemon.start(launcher=launcher)
        statistics = use(daemon)
        if taken == "uring" and statistics["io_engine"] == "threads":
            pytest.skip(f"no io_uring here: {statistics['io_engine_reason']}")
        assert statistics["io_engine"] == taken
        assert str(statistics["io_engine_reason"]).startswith(reason)
        assert statistics["io_under_way"] == 0
        words = "by io_uring" if taken == "uring" else f"by worker threads ({reason}"
        assert any(f"wait for a medium: {words}" in line for line in daemon.lines)
        metrics = daemon.api("GET", "/metrics").text
        assert f"iscsi_io_uring {1.0 if taken == 'uring' else 0.0}" in metrics
        assert daemon.terminate() == 0
        assert not daemon.tracebacks()
    finally:
        daemon.kill9()


def test_who_insists_on_io_uring_is_told_why_there_is_none(tmp_path: Path) -> None:
    daemon = daemon_with("uring", tmp_path)
    with pytest.raises(DaemonError, match="--io-engine uring: io_uring cannot be used: it is forbidden"):
        daemon.start(launcher=REFUSING)
    daemon.kill9()
