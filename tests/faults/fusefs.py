"""A file system that fails on command: a directory passed through FUSE, with a gate and errors in the way.

``FaultyFs`` mounts it in a process of its own and steers it by lines on a pipe; each command is answered when
it is in force. An operation that comes to a closed gate says so before it waits, so a test can wait for that
instead of for a time.

Mounted ``volatile`` it is a disk with a cache: what is written reaches the backing directory with fsync(2),
and ``cut_power`` loses the rest but for some blocks of it at random, as a disk does that had begun to write.

Run as a program it is the file system itself: ``python -m tests.faults.fusefs BACKING MOUNTPOINT``.
"""

import errno
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

__all__ = ["OPERATIONS", "FaultyFs", "faulty_fs"]

BLOCK: Final = 512
OPERATIONS: Final = ("read", "write", "fsync", "getattr", "open", "truncate")
PATIENCE_S: Final = 120.0
ROOT: Final = Path(__file__).resolve().parents[2]


class FaultyFs:
    """The file system, mounted, from the side of the test."""

    def __init__(self, backing: Path, at: Path, volatile: bool = False) -> None:
        self.backing = backing
        self.at = at
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.faults.fusefs", str(backing), str(at)),
                *(["volatile"] if volatile else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._said: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._said.append(line.strip())
                self._changed.notify_all()
        with self._changed:
            self._said.append("ended")
            self._changed.notify_all()

    def wait_for(self, said: str) -> None:
        """Until the file system has said this, which is then taken away."""
        with self._changed:
            came = self._changed.wait_for(lambda: said in self._said or "ended" in self._said, PATIENCE_S)
            assert came and said in self._said, f"{said!r} did not come: {self._said}"
            self._said.remove(said)

    def _command(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        self.wait_for("done " + " ".join(words))

    def stall(self, *operations: str) -> None:
        """From now on these operations (none named: all) wait for ``go``."""
        self._command("stall", *(operations or OPERATIONS))

    def wait_for_stalled(self, operation: str) -> None:
        """Until one of them waits."""
        self.wait_for(f"stalled {operation}")

    def go(self) -> None:
        """Let everything that waits go on, and nothing wait any more."""
        self._command("go")

    def fail(self, number: int, *operations: str) -> None:
        """From now on these operations fail with this errno."""
        self._command("fail", str(number), *(operations or OPERATIONS))

    def clear(self) -> None:
        """No failures any more."""
        self._command("clear")

    def truncate(self, name: str, size: int) -> None:
        """Cut a file off behind everybody's back."""
        os.truncate(self.backing / name, size)

    def cut_power(self, seed: int) -> None:
        """Lose what is in the cache; the file system is dead afterwards."""
        self._command("cut", str(seed))
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Unmount."""
        if self.process.poll() is None:
            self.go()
        subprocess.run(["umount", "--lazy", str(self.at)], check=False, capture_output=True)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _why_not() -> str | None:
    if os.geteuid():
        return "needs root to mount"
    if not Path("/dev/fuse").exists():
        return "the kernel has no FUSE"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        return f"mfusepy cannot be used: {error}"
    return None


@contextmanager
def faulty_fs(directory: Path, *, volatile: bool = False) -> Iterator[FaultyFs]:
    """One for the length of a ``with``; skips, with the reason, where there can be none."""
    reason = _why_not()
    if reason:
        pytest.skip(reason)
    backing, at = directory / "backing", directory / "fuse"
    backing.mkdir(exist_ok=True)
    at.mkdir(exist_ok=True)
    made = FaultyFs(backing, at, volatile)
    try:
        made.wait_for("mounted")
        yield made
    finally:
        made.end()


# -- the file system itself -----------------------------------------------------------------------


class _Cache:
    """Of a disk: blocks that were written and not flushed yet, by the path of their file."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.dead = False
        self.blocks: dict[str, dict[int, bytes]] = {}

    def write(self, path: str, data: bytes, offset: int) -> None:
        """Whole blocks only; ``offset`` and length are multiples of ``BLOCK``."""
        with self.lock:
            blocks = self.blocks.setdefault(path, {})
            for at in range(0, len(data), BLOCK):
                blocks[offset + at] = data[at : at + BLOCK]

    def over(self, path: str, data: bytes, offset: int) -> bytes:
        """What the medium has, and the cache over it."""
        with self.lock:
            blocks = self.blocks.get(path, {})
            parts = [blocks.get(offset + at, data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
        return b"".join(parts)

    def flush(self, path: str, chosen: Callable[[], bool] = lambda: True) -> None:
        """To the medium, all or what is ``chosen``."""
        with self.lock:
            if self.dead:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            blocks = self.blocks.pop(path, {})
            fd = os.open(path, os.O_WRONLY)
            try:
                for offset, data in blocks.items():
                    if chosen():
                        os.pwrite(fd, data, offset)
            finally:
                os.close(fd)

    def cut(self, chance: random.Random) -> None:
        """The power goes, while the disk is at some of its blocks."""
        for path in list(self.blocks):
            self.flush(path, lambda: chance.random() < 0.5)
        self.dead = True


def _main(backing: str, mountpoint: str, cache: _Cache | None) -> None:
    import mfusepy

    lock = threading.Lock()
    gate = threading.Event()
    gate.set()
    stalled: set[str] = set()
    failing: dict[str, int] = {}

    def say(line: str) -> None:
        with lock:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def obey() -> None:
        for line in sys.stdin:
            verb, *words = line.split()
            if verb == "stall":
                stalled.update(words)
                gate.clear()
            elif verb == "go":
                stalled.clear()
                gate.set()
            elif verb == "fail":
                failing.update(dict.fromkeys(words[1:], int(words[0])))
            elif verb == "clear":
                failing.clear()
            elif verb == "cut" and cache is not None:
                cache.cut(random.Random(int(words[0])))
            say("done " + line.strip())

    def meet(operation: str) -> None:
        if operation in stalled:
            say(f"stalled {operation}")
            gate.wait()
        number = failing.get(operation)
        if number:
            raise mfusepy.FuseOSError(number)

    class PassThrough(mfusepy.Operations):
        use_ns = True

        def _real(self, path: str) -> str:
            return backing + path

        def init(self, path: str) -> None:
            say("mounted")

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            if path != "/":
                meet("getattr")
            found = os.lstat(self._real(path))
            names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino")
            answer = {name: getattr(found, name) for name in names}
            return {**answer, **{f"st_{k}time": getattr(found, f"st_{k}time_ns") for k in "amc"}}

        def readdir(self, path: str, fh: int) -> Any:
            return [".", "..", *os.listdir(self._real(path))]  # noqa: PTH208 - names is what is wanted

        def open(self, path: str, flags: int) -> int:
            meet("open")
            # Written at offsets: the kernel has dealt with O_APPEND, and truncates by itself.
            return os.open(self._real(path), flags & ~(os.O_APPEND | os.O_CREAT | os.O_EXCL))

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            meet("open")
            return os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, stat.S_IMODE(mode))

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            meet("read")
            data = os.pread(fh, size, offset)
            return data if cache is None else cache.over(self._real(path), data, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            meet("write")
            if cache is None or offset % BLOCK or len(data) % BLOCK:
                return os.pwrite(fh, data, offset)
            cache.write(self._real(path), data, offset)
            return len(data)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            meet("truncate")
            os.truncate(self._real(path), length)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            meet("fsync")
            if cache is not None:
                cache.flush(self._real(path))
            os.fsync(fh)
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def unlink(self, path: str) -> int:
            Path(self._real(path)).unlink()
            return 0

        def rename(self, old: str, new: str) -> int:
            Path(self._real(old)).rename(self._real(new))
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(backing)
            names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree")
            return {name: getattr(found, name) for name in names}

    threading.Thread(target=obey, daemon=True).start()
    mfusepy.FUSE(PassThrough(), mountpoint, foreground=True, attr_timeout=0, entry_timeout=0)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], _Cache() if "volatile" in sys.argv[3:] else None)
