"""The ring: what goes in comes out, slots are a medium's own, and no buffer is let go before its time."""

import ctypes
import errno
import gc
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import uring
from storage.base import Buffer, Rest
from storage.file import File
from storage.handle import Handle, open_file
from storage.uring import Ring
from storage.wrap import Slow, Wrapper
from tests.faults.fusefs import faulty_fs

PAGE = 4096
PATIENCE_S = 60.0

Result = Buffer | Rest | None


class Turns:
    """An event loop of one ring: ``until`` goes round until something is true."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []
        self.ring = Ring(self.due.append, self.due.append)

    def turn(self, wait_s: float = PATIENCE_S) -> None:
        due, self.due[:] = list(self.due), []
        for call in due:
            call()
        assert select.select([self.ring.fd], [], [], wait_s)[0], "nothing has ended"
        self.ring.reap()

    def until(self, true: Callable[[], object]) -> None:
        while not true():
            self.turn()


@pytest.fixture
def turns() -> Iterator[Turns]:
    try:
        made = Turns()
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    yield made
    made.ring.close()


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(64 * PAGE)
    (tmp_path / "file").write_bytes(data)
    return data


def errno_of(rest: Result) -> int | None:
    """How the rest of an operation ends; neither it nor its traceback, which have the file open, is kept."""
    assert callable(rest)
    try:
        rest()
    except OSError as error:
        return error.errno
    raise AssertionError("it did not fail")


def opened(path: Path) -> Handle:
    return open_file(str(path), writable=True)[0]


def test_many_operations_of_one_turn_all_end_with_what_they_asked_for(
    turns: Turns, content: bytes, tmp_path: Path
) -> None:
    """More than the rings have entries: submission takes several calls, and completions overflow."""
    handle = opened(tmp_path / "file")
    slots = turns.ring.slots(4 * uring.ENTRIES)
    wanted = [(number * 7919 % 63) * PAGE + number % PAGE for number in range(3 * uring.ENTRIES)]
    read: dict[int, bytes] = {}
    for number, offset in enumerate(wanted):
        data = bytes(PAGE)
        slots.read(handle, offset, data, lambda count, n=number, d=data: read.update({n: d[:count]}))  # type: ignore[misc]
    turns.until(lambda: len(read) == len(wanted))
    assert [read[number] for number in range(len(wanted))] == [content[at : at + PAGE] for at in wanted]
    assert not turns.ring.under_way and not slots.in_flight


def test_what_is_written_and_flushed_is_in_the_file(turns: Turns, content: bytes, tmp_path: Path) -> None:
    handle = opened(tmp_path / "file")
    slots = turns.ring.slots(8)
    ended: list[int] = []
    pieces: list[Buffer] = [b"a" * 100, bytearray(b"b" * 5000), memoryview(bytearray(b"c" * 300))[7:]]
    for number, piece in enumerate(pieces):
        slots.write(handle, number * 2 * PAGE, piece, 0, ended.append)
    turns.until(lambda: len(ended) == 3)
    slots.flush(handle, ended.append)
    turns.until(lambda: len(ended) == 4)
    assert sorted(ended) == [0, 100, 293, 5000]
    now = (tmp_path / "file").read_bytes()
    for number, piece in enumerate(pieces):
        assert now[number * 2 * PAGE :][: len(piece)] == piece


def test_an_error_is_told_as_minus_its_errno(turns: Turns, content: bytes, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    ended: list[int] = []
    turns.ring.slots(1).write(Handle(fd), 0, b"x", 0, ended.append)
    turns.until(lambda: ended)
    assert ended == [-errno.EBADF]


def test_what_goes_wrong_at_one_end_keeps_nobody_from_hearing_of_theirs(
    turns: Turns, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handle = opened(tmp_path / "file")
    slots = turns.ring.slots(8)
    ended: list[int] = []

    def fail(count: int) -> None:
        raise RuntimeError("a fault of ours")

    for end in (fail, ended.append, fail, ended.append):
        slots.read(handle, 0, bytes(PAGE), end)
    turns.until(lambda: len(ended) == 2)
    assert ended == [PAGE, PAGE] and len(caplog.records) == 2 and not slots.in_flight


def test_a_medium_that_hangs_fills_its_own_slots_alone(turns: Turns, tmp_path: Path) -> None:
    (tmp_path / "well").write_bytes(os.urandom(4 * PAGE))
    with faulty_fs(tmp_path) as fs:
        (fs.backing / "stuck").write_bytes(bytes(64 * PAGE))
        stuck, well = opened(fs.at / "stuck"), opened(tmp_path / "well")
        hanging, other = turns.ring.slots(3), turns.ring.slots(3)
        ended: list[int] = []
        late: list[int] = []
        fs.stall("read")
        for number in range(32):
            hanging.read(stuck, number * PAGE, bytes(PAGE), late.append)
        for number in range(12):
            other.read(well, number % 4 * PAGE, bytes(PAGE), ended.append)
        other.flush(well, ended.append)
        turns.until(lambda: len(ended) == 13)
        assert ended == [PAGE] * 12 + [0]
        assert not late and hanging.in_flight == 3
        fs.go()
        turns.until(lambda: len(late) == 32)
        assert late == [PAGE] * 32
        del stuck


def test_a_file_system_that_asks_before_it_reads_holds_up_no_submission(
    turns: Turns, content: bytes, tmp_path: Path
) -> None:
    """FUSE and NFS ask for a file's size before they look what is in memory, and wait for the answer."""
    with faulty_fs(tmp_path) as fs:
        (fs.backing / "stuck").write_bytes(bytes(64 * PAGE))
        stuck, well = File(str(fs.at / "stuck")), File(str(tmp_path / "file"))
        late: list[Result] = []
        results: list[Result] = []
        for backend in (stuck, well):
            backend.serve_by(turns.ring)
        fs.stall("getattr")
        rescue = threading.Timer(20, fs.go)  # a submission that waits would wait for ever
        rescue.start()
        for number in range(3):
            assert stuck.begin_read(number * PAGE, PAGE, late.append)
        assert well.begin_read(0, PAGE, results.append)
        turns.until(lambda: results)
        fs.wait_for_stalled("getattr")
        rescue.cancel()
        assert results == [content[:PAGE]] and not late
        fs.go()
        turns.until(lambda: len(late) == 3)
        assert late == [bytes(PAGE)] * 3
        stuck.close()


LEAVES = """
import sys
from storage.handle import open_file
from storage.uring import Ring

class Told(bytearray):
    def __del__(self, write=sys.__stdout__.write, flush=sys.__stdout__.flush):
        write("freed")
        flush()

due = []
ring = Ring(due.append, due.append)
ring.slots(1).write(open_file(sys.argv[1], writable=True)[0], 0, Told(4096), 0, print)
ring.submit()
sys.stdin.readline()
if sys.argv[2] == "closed":
    ring.close()
"""


@pytest.mark.parametrize("how", ["closed", "left open"])
def test_an_interpreter_that_ends_frees_no_buffer_of_what_is_under_way(tmp_path: Path, how: str) -> None:
    """A write that hangs may go on at any moment before the process is gone: with its own data."""
    with faulty_fs(tmp_path) as fs:
        (fs.backing / "file").write_bytes(bytes(64 * PAGE))
        fs.stall("write")
        argv = (sys.executable, "-c", LEAVES, str(fs.at / "file"), how)
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        fs.wait_for_stalled("write")
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        fs.go()  # the kernel lets no process end before that
        assert child.communicate() == ("", None)
        assert child.returncode == 0


def test_a_buffer_is_kept_until_its_read_has_ended_whoever_forgets_it(turns: Turns, tmp_path: Path) -> None:
    """Nobody waits for it and the backend is closed: the kernel still writes there, and nowhere else."""
    with faulty_fs(tmp_path) as fs:
        (fs.backing / "file").write_bytes(b"\xee" * 64 * PAGE)
        backend = File(str(fs.at / "file"))
        backend.serve_by(turns.ring)
        ended: list[int] = []
        fs.stall("read")
        for number in range(8):
            assert backend.begin_read(number * 8 * PAGE, 8 * PAGE, lambda result: ended.append(1))
        turns.due[0]()
        turns.due.clear()
        fs.wait_for_stalled("read")
        backend.close()
        del backend
        gc.collect()
        # whoever gets memory of that size now must keep what it puts there
        others = [bytearray(b"\x11" * (8 * PAGE)) for _ in range(256)]
        assert turns.ring.under_way == 8
        fs.go()
        turns.until(lambda: len(ended) == 8)
        assert all(other.count(0x11) == 8 * PAGE for other in others)
        assert not turns.ring.under_way


def test_a_read_through_a_file_gives_its_bytes_or_the_rest(
    turns: Turns, content: bytes, tmp_path: Path
) -> None:
    """A file that was cut off under us: the ring's short count becomes a worker's true error."""
    backend = File(str(tmp_path / "file"))
    backend.serve_by(turns.ring)
    results: list[Result] = []
    assert backend.begin_read(512, 3 * PAGE, results.append)
    turns.until(lambda: results)
    assert results.pop() == content[512 : 512 + 3 * PAGE]
    os.truncate(tmp_path / "file", 10 * PAGE)
    assert backend.begin_read(9 * PAGE, 2 * PAGE, results.append)
    turns.until(lambda: results)
    rest = results.pop()
    assert callable(rest)
    with pytest.raises(OSError, match=r"cut off|ends before") as raised:
        rest()
    assert raised.value.errno == errno.EIO
    assert not backend.begin_read(0, PAGE, results.append), "a known fault is for a worker to name"


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("unflushed", [0, 4 << 20])
def test_a_write_through_a_file_is_in_it(
    turns: Turns, content: bytes, tmp_path: Path, durable: bool, unflushed: int
) -> None:
    """Durable: by a flush that it shares, or, where more waits to be flushed, written through by itself."""
    backend = File(str(tmp_path / "file"))
    backend.serve_by(turns.ring)
    backend._unflushed = unflushed
    results: list[Result] = []
    pieces = {100: b"a" * PAGE, 7 * PAGE: b"b" * 512, 20 * PAGE: b"c" * 40 * PAGE}
    expected = bytearray(content)
    for offset, data in pieces.items():
        assert backend.begin_write(offset, data, results.append, durable=durable)
        expected[offset : offset + len(data)] = data
    assert not results, "never from within"
    turns.until(lambda: len(results) == 3)
    assert results == [None] * 3
    assert (tmp_path / "file").read_bytes() == expected


def test_a_failed_flush_is_everyones_and_counts_as_lost_writes(turns: Turns, tmp_path: Path) -> None:
    with faulty_fs(tmp_path) as fs:
        (fs.backing / "file").write_bytes(bytes(64 * PAGE))
        backend = File(str(fs.at / "file"))
        backend.serve_by(turns.ring)
        results: list[Result] = []
        fs.stall("fsync")
        assert backend.begin_flush(results.append)
        for call in turns.due:
            call()
        turns.due.clear()
        fs.wait_for_stalled("fsync")
        for _ in range(5):
            assert backend.begin_flush(results.append)
        fs.fail(errno.EIO, "fsync")
        fs.go()
        turns.until(lambda: len(results) == 6)
        lost = backend.lost_writes
        assert lost == 2, "one run for the first, one for all that came during it"
        for rest in results:
            assert callable(rest)
            with pytest.raises(OSError, match="rror") as raised:
                rest()
            assert raised.value.errno == errno.EIO
        assert backend.lost_writes == lost and "write-back error" in backend.status
        fs.clear()
        results.clear()
        assert backend.begin_flush(results.append)
        turns.until(lambda: results)
        assert results == [None]
        backend.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_says_why(turns: Turns, tmp_path: Path, number: int) -> None:
    with faulty_fs(tmp_path) as fs:
        (fs.backing / "file").write_bytes(bytes(64 * PAGE))
        backend = File(str(fs.at / "file"))
        backend.serve_by(turns.ring)
        results: list[Result] = []
        fs.fail(number, "write")
        assert backend.begin_write(0, bytes(PAGE), results.append)
        turns.until(lambda: results)
        assert errno_of(results.pop()) == number
        backend.close()


def test_a_backend_for_reading_begins_no_writes(turns: Turns, content: bytes, tmp_path: Path) -> None:
    backend = File(str(tmp_path / "file"), read_only=True)
    backend.serve_by(turns.ring)
    assert not backend.begin_write(0, b"x", lambda result: None)
    assert not backend.begin_flush(lambda result: None)


def test_a_backend_without_a_ring_begins_nothing(content: bytes, tmp_path: Path) -> None:
    assert not File(str(tmp_path / "file")).begin_read(0, PAGE, lambda result: None)


def test_a_wrapper_begins_what_it_has_no_concern_in(turns: Turns, content: bytes, tmp_path: Path) -> None:
    backend = Wrapper(File(str(tmp_path / "file")))
    backend.serve_by(turns.ring)
    results: list[Result] = []
    assert backend.begin_read(0, PAGE, results.append)
    turns.until(lambda: results)
    assert results == [content[:PAGE]]
    assert not Slow(backend, operations=frozenset(("read",))).begin_read(0, PAGE, results.append)


REFUSE = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
# seccomp(2): load the number of the call; io_uring_setup (425) fails with this errno; all else is allowed
refuse, allow = 0x00050000 | {errno}, 0x7FFF0000
code = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 425, 0x06, 0, 0, refuse, 0x06, 0, 0, allow)
buffer = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
from targetd.engine.io_engine import IoEngine, available
from targetd.net.loop import Loop
print(available().strerror)
engine = IoEngine(Loop(), "auto", print)
print(engine.name, engine.ring, engine.reason)
"""


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EPERM, "forbidden"), (errno.ENOSYS, "a sandbox hides it")],
    ids=["EPERM", "ENOSYS"],
)
def test_where_io_uring_is_refused_threads_are_taken_and_the_reason_is_known(number: int, words: str) -> None:
    """As by the seccomp profiles of containers, or by gVisor."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        pytest.skip("the filter is written for 64 bits")
    done = subprocess.run(
        [sys.executable, "-c", REFUSE.replace("{errno}", str(number))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    reason, engine = done.stdout.splitlines()
    assert words in reason
    assert engine == f"threads None {reason}"
