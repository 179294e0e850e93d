"""File extents: residency, size, holes, faults."""

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from storage import linux
from storage.base import Buffer, Run
from storage.file import File
from storage.mapping import CHUNK, PAGE, STORE_LIMIT
from storage.paged import INLINE_WRITE_LIMIT, SLOW_WRITE_PAUSE, WATCHED_WRITES
from tests.media import drop_from_cache, file_system, requires_loop_devices

MIB = 1 << 20
DATA = os.urandom(MIB)


def sent(view: Buffer) -> bytes:
    """What a peer receives when the view goes out through a socket, as replies do."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        received = bytearray()

        def receive() -> None:
            while len(received) < len(view):
                received.extend(theirs.recv(65536))

        reader = threading.Thread(target=receive)
        reader.start()
        ours.sendall(view)
        reader.join(10)
    return bytes(received)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk.img"
    file.write_bytes(DATA)
    return file


# -- what is in memory ----------------------------------------------------------------------------


def test_what_is_in_memory_goes_out_from_the_mapping(path: Path) -> None:
    extent = File(str(path))
    view = extent.read_nowait(4096, 8192)
    assert isinstance(view, memoryview)
    assert view.readonly
    assert sent(view) == DATA[4096:12288]


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (0, MIB), (CHUNK - 512, 1024), (MIB - 512, 512), (CHUNK - 4096, CHUNK), (3, 5)],
)
def test_any_range_in_memory_is_found_also_when_asked_again(path: Path, offset: int, length: int) -> None:
    extent = File(str(path))
    for _ in range(2):
        view = extent.read_nowait(offset, length)
        assert view is not None
        assert sent(view) == DATA[offset : offset + length]


def test_a_cold_range_waits_for_a_worker_and_is_warm_then(path: Path) -> None:
    drop_from_cache(path)
    extent = File(str(path))
    assert extent.read_nowait(8192, 4096) is None
    assert extent.copy_nowait(8192, 4096) is None
    assert extent.read(8192, 4096) == DATA[8192:12288]
    assert extent.read_nowait(8192, 4096) is not None
    assert extent.copy_nowait(8192, 4096) == DATA[8192:12288]


def test_a_hole_becomes_warm_by_being_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(MIB)
    extent = File(str(path))
    assert extent.read_nowait(0, 4096) is None
    assert extent.read(0, 4096) == bytes(4096)
    assert extent.read_nowait(0, 4096) is not None
    assert extent.space().used == 0


def test_a_fact_outlives_the_page_only_until_the_next_tick(path: Path) -> None:
    extent = File(str(path))
    assert extent.read_nowait(0, 4096) is not None
    drop_from_cache(path)
    extent.tick()
    assert extent.read_nowait(0, 4096) is None


def test_the_last_partial_page_and_chunk_are_served(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(DATA[: CHUNK + 700])
    extent = File(str(path))
    assert extent.geometry.size_bytes == CHUNK + 700
    view = extent.read_nowait(CHUNK, 700)
    assert view is not None
    assert sent(view) == DATA[CHUNK : CHUNK + 700]


def test_without_a_mapping_what_is_in_memory_is_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No address space, or a file whose residency we may not ask about: RWF_NOWAIT stands in."""
    monkeypatch.setattr("storage.paged.may_ask", lambda fd: False)
    extent = File(str(path))
    assert extent.read_nowait(4096, 4096) == DATA[4096:8192]
    drop_from_cache(path)
    assert extent.read_nowait(MIB - 4096, 4096) is None


def test_views_outlive_the_extent(path: Path) -> None:
    extent = File(str(path))
    view = extent.read_nowait(0, 4096)
    assert view is not None
    extent.close()
    assert sent(view) == DATA[:4096]
    assert extent.read_nowait(0, 4096) is None
    for call in (lambda: extent.read(0, 512), lambda: extent.write(0, b"x"), extent.refresh):
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_an_operation_under_way_keeps_the_descriptor_past_close(path: Path) -> None:
    """Else its number could be another file's by the time the call is made."""
    extent = File(str(path))
    runs = extent.runs(0, MIB)
    handle = extent._handle
    extent.close()
    assert os.fstat(handle.fd).st_size == MIB
    assert list(runs) == [Run(0, MIB, True)]
    fd = handle.fd
    del runs, handle
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# -- writing --------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_by_every_way(path: Path) -> None:
    extent = File(str(path))
    assert extent.write_nowait(0, b"a" * 4096)
    extent.write(4096, b"b" * 4096)
    extent.write(8192, memoryview(b"c" * 4096), durable=True)
    expected = b"a" * 4096 + b"b" * 4096 + b"c" * 4096
    view = extent.read_nowait(0, 12288)
    assert view is not None
    assert sent(view) == expected
    assert extent.copy_nowait(0, 12288) == expected
    extent.flush()
    assert path.read_bytes() == expected + DATA[12288:]


@pytest.mark.parametrize(
    ("offset", "length", "inline"),
    [(4096, 4096, True), (4096, 8192, True), (512, 512, False), (4096, 512, False), (3584, 4608, False)],
)
def test_a_partly_covered_page_that_is_cold_is_left_to_a_worker(
    path: Path, offset: int, length: int, inline: bool
) -> None:
    """The kernel would have to read the rest of the page first."""
    drop_from_cache(path)
    extent = File(str(path))
    assert extent.write_nowait(offset, bytes(length)) is inline


def test_a_partly_covered_page_that_is_warm_is_written_inline(path: Path) -> None:
    drop_from_cache(path)
    extent = File(str(path))
    extent.read(0, 8192)
    assert extent.write_nowait(512, b"z" * 7168)
    assert extent.read(0, 8192) == DATA[:512] + b"z" * 7168 + DATA[7680:8192]


def test_a_large_write_is_left_to_a_worker(path: Path) -> None:
    extent = File(str(path))
    assert not extent.write_nowait(0, bytes(INLINE_WRITE_LIMIT + 4096))
    assert extent.read(0, MIB) == DATA


def slow_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every write seems to take long; returns the time, which a test may move."""
    now = [100.0]

    def clock() -> float:
        now[0] += 0.1  # every call later
        return now[0]

    monkeypatch.setattr("storage.paged.perf_counter", clock)
    monkeypatch.setattr("storage.paged.SLOW_WRITE_S", 0.01)
    return now


def test_after_slow_inline_writes_that_slept_a_worker_takes_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extent = File(str(path))
    now = slow_clock(monkeypatch)
    pwrite = os.pwrite

    def sleeping(*arguments: Any) -> int:
        threading.Event().wait(0.001)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", sleeping)
    data = bytes(STORE_LIMIT + PAGE)
    assert extent.write_nowait(0, data)
    assert extent.write_nowait(0, data)
    assert not extent.write_nowait(0, data)
    now[0] += 10
    assert extent.write_nowait(0, data)
    assert not extent.write_nowait(0, data)


def test_the_longer_an_inline_write_slept_the_longer_workers_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop waits for a medium a small part of its time at most, whatever one wait takes."""
    extent = File(str(path))
    now = [100.0]
    monkeypatch.setattr("storage.paged.perf_counter", lambda: now[0])
    monkeypatch.setattr("storage.paged.SLOW_WRITE_S", 0.01)
    pwrite, naps = os.pwrite, [0.02, 0.02, 0.2]

    def sleeping(*arguments: Any) -> int:
        threading.Event().wait(0.001)
        now[0] += naps.pop(0)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", sleeping)
    data = bytes(STORE_LIMIT + PAGE)
    assert extent.write_nowait(0, data)
    for nap in (0.02, 0.2):
        assert extent.write_nowait(0, data)
        now[0] += nap * (SLOW_WRITE_PAUSE - 1)
        assert not extent.write_nowait(0, data)
        now[0] += nap * 2


def test_a_thread_that_only_lost_its_processor_has_not_met_a_slow_medium(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a busy host, where every write costs a worker hop for a second, would become busier still."""
    extent = File(str(path))
    slow_clock(monkeypatch)
    monkeypatch.setattr("storage.paged._sleeps", lambda: 7)
    assert all(extent.write_nowait(0, bytes(4096)) for _ in range(3 * WATCHED_WRITES))


def test_a_read_only_extent_refuses_every_change(path: Path) -> None:
    extent = File(str(path), read_only=True)
    assert not extent.capabilities.writable
    assert not extent.capabilities.unmap
    assert not extent.write_nowait(0, bytes(4096))
    for change in (
        lambda: extent.write(0, b"x"),
        lambda: extent.unmap(0, 4096),
        lambda: extent.write_zeroes(0, 4096),
        lambda: extent.copy_from(extent, 0, 8192, 4096),
        lambda: extent.resize(2 * MIB),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    extent.flush()
    assert path.read_bytes() == DATA


# -- size -----------------------------------------------------------------------------------------


def test_a_larger_size_grows_the_file_sparse(path: Path) -> None:
    """api-semantics §6.3."""
    used = path.stat().st_blocks
    extent = File(str(path), 64 * MIB)
    assert extent.geometry.size_bytes == path.stat().st_size == 64 * MIB
    assert path.stat().st_blocks == used
    assert extent.read(0, MIB) == DATA


def test_a_smaller_size_keeps_the_file(path: Path) -> None:
    """api-semantics §6.3."""
    extent = File(str(path), MIB // 2)
    assert extent.geometry.size_bytes == MIB // 2
    extent.resize(MIB // 4)
    assert extent.geometry.size_bytes == MIB // 4
    assert path.read_bytes() == DATA


def test_resize_grows_the_file_and_serves_the_new_part(path: Path) -> None:
    extent = File(str(path))
    old = extent.read_nowait(0, 4096)
    extent.resize(3 * MIB + 512)
    assert path.stat().st_size == 3 * MIB + 512
    assert extent.geometry.size_bytes == 3 * MIB + 512
    extent.write(3 * MIB, b"e" * 512)
    view = extent.read_nowait(3 * MIB, 512)
    assert view is not None
    assert sent(view) == b"e" * 512
    assert old is not None
    assert sent(old) == DATA[:4096]


def test_an_automatic_size_follows_the_file_as_it_grows(path: Path) -> None:
    extent = File(str(path))
    with path.open("ab") as file:
        file.write(b"n" * 4096)
    assert extent.refresh().size_bytes == MIB + 4096
    assert extent.read(MIB, 4096) == b"n" * 4096


def test_a_given_size_does_not_follow_the_file(path: Path) -> None:
    extent = File(str(path), MIB)
    with path.open("ab") as file:
        file.write(b"n" * 4096)
    assert extent.refresh().size_bytes == MIB


def test_more_than_two_tebibytes(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    size = (5 << 40) + 512
    extent = File(str(path), size)
    at = (3 << 40) + 4096
    assert extent.write_nowait(at, b"x" * 4096)
    view = extent.read_nowait(at, 4096)
    assert view is not None
    assert sent(view) == b"x" * 4096
    extent.write(size - 512, b"y" * 512)
    assert extent.read(size - 512, 512) == b"y" * 512
    assert list(extent.runs(at - 4096, 12288)) == [
        Run(at - 4096, 4096, False),
        Run(at, 4096, True),
        Run(at + 4096, 4096, False),
    ]
    extent.unmap(0, size)
    assert list(extent.runs(0, size)) == [Run(0, size, False)]


def test_a_read_only_file_shorter_than_its_size_is_refused(path: Path) -> None:
    with pytest.raises(OSError, match="shorter") as caught:
        File(str(path), 2 * MIB, read_only=True)
    assert caught.value.errno == errno.EINVAL
    assert path.stat().st_size == MIB


# -- holes ----------------------------------------------------------------------------------------


def test_unmapped_space_returns_to_the_host_and_reads_as_zeros(path: Path) -> None:
    extent = File(str(path))
    assert extent.capabilities.unmap
    assert extent.capabilities.unmap_reads_zero
    extent.flush()
    before = extent.space().used
    extent.unmap(CHUNK, CHUNK)
    assert extent.space().used <= before - CHUNK
    assert extent.read(0, MIB) == DATA[:CHUNK] + bytes(CHUNK) + DATA[2 * CHUNK :]
    assert list(extent.runs(0, MIB)) == [
        Run(0, CHUNK, True),
        Run(CHUNK, CHUNK, False),
        Run(2 * CHUNK, MIB - 2 * CHUNK, True),
    ]
    assert list(extent.runs(CHUNK + 512, 1024)) == [Run(CHUNK + 512, 1024, False)]


def test_pages_of_a_hole_are_no_longer_known_to_be_in_memory(path: Path) -> None:
    extent = File(str(path))
    assert extent.read_nowait(0, 4096) is not None
    extent.unmap(0, CHUNK)
    drop_from_cache(path)
    assert extent.read_nowait(0, 4096) is None


def test_the_edges_of_an_unaligned_unmap_are_zeroed(path: Path) -> None:
    extent = File(str(path))
    extent.unmap(1000, 10000)
    assert extent.read(0, 16384) == DATA[:1000] + bytes(10000) + DATA[11000:16384]


def test_zeroes_keep_their_space(path: Path) -> None:
    extent = File(str(path))
    extent.flush()
    before = extent.space().used
    extent.write_zeroes(1000, CHUNK)
    extent.flush()
    assert extent.read(0, MIB) == DATA[:1000] + bytes(CHUNK) + DATA[1000 + CHUNK :]
    assert extent.space().used >= before


# -- copying --------------------------------------------------------------------------------------


def test_a_copy_keeps_holes_holes(tmp_path: Path) -> None:
    for name in ("source", "destination"):
        (tmp_path / name).touch()
    source, destination = (File(str(tmp_path / name), 4 * MIB) for name in ("source", "destination"))
    source.write(MIB, DATA)
    destination.write(0, b"o" * 4 * MIB)
    destination.copy_from(source, 512, 512, 4 * MIB - 512)
    assert destination.read(0, 4 * MIB) == b"o" * 512 + bytes(MIB - 512) + DATA + bytes(2 * MIB)
    destination.flush()
    assert destination.space().used <= MIB + 16384


@pytest.mark.parametrize(("source", "to"), [(0, 3000), (3000, 0), (0, MIB // 4), (MIB // 4, 0), (7, 7)])
def test_overlapping_ranges_copy_as_if_read_first(path: Path, source: int, to: int) -> None:
    extent = File(str(path))
    extent.resize(4 * MIB)
    length = 3 * MIB + 1234
    before = extent.read(0, 4 * MIB)
    extent.copy_from(extent, source, to, length)
    expected = bytearray(before)
    expected[to : to + length] = before[source : source + length]
    assert extent.read(0, 4 * MIB) == expected


# -- faults ---------------------------------------------------------------------------------------

TRUNCATED_UNDER_A_VIEW = """
import errno, os, socket, sys
from storage.file import File

path = sys.argv[1]
extent = File(path)
view = extent.read_nowait(65536, 65536)
os.truncate(path, 4096)
pipe = os.pipe()
ours, theirs = socket.socketpair()
for send in (lambda: os.writev(pipe[1], [view]), lambda: ours.sendmsg([view])):
    try:
        send()
    except OSError as error:
        print(errno.errorcode[error.errno])
for attempt in (lambda: extent.read(65536, 65536), lambda: extent.write(65536, bytes(512))):
    try:
        attempt()
    except OSError as error:
        print(errno.errorcode[error.errno])
print(extent.read_nowait(0, 512), extent.write_nowait(0, bytes(4096)), os.path.getsize(path))
os.truncate(path, 1 << 20)
extent.tick()
print(extent.read(65536, 512) == bytes(512), extent.status)
"""


def test_truncation_under_a_mapping_is_an_error_and_not_a_death(path: Path) -> None:
    """In a process of its own, since a mistake here is SIGBUS (style, Storage)."""
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED_UNDER_A_VIEW, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["EFAULT", "EFAULT", "EIO", "EIO", "None False 4096", "True ok", ""]


def test_tick_notices_a_file_that_was_cut_off(path: Path) -> None:
    extent = File(str(path))
    assert extent.read_nowait(0, 4096) is not None
    os.truncate(path, 8192)
    extent.tick()
    assert extent.read_nowait(0, 4096) is None
    assert "cut off at 8192" in extent.status
    with pytest.raises(OSError) as caught:
        extent.refresh()
    assert caught.value.errno == errno.EIO
    os.truncate(path, MIB)
    assert extent.refresh().size_bytes == MIB
    assert extent.status == "ok"
    assert extent.write_nowait(0, bytes(4096))


def test_a_deleted_file_takes_no_more_writes(path: Path) -> None:
    extent = File(str(path))
    assert extent.write_nowait(0, bytes(4096))
    path.unlink()
    extent.tick()
    assert not extent.write_nowait(0, bytes(4096))
    with pytest.raises(OSError) as caught:
        extent.write(0, bytes(4096))
    assert caught.value.errno == errno.ENOENT


def test_a_vanished_file_is_found_again(path: Path) -> None:
    extent = File(str(path))
    aside = path.with_name("aside")
    path.rename(aside)
    with pytest.raises(FileNotFoundError):
        extent.refresh()
    with pytest.raises(FileNotFoundError):
        extent.read(0, 512)
    assert extent.read_nowait(0, 512) is None
    aside.rename(path)
    assert extent.refresh().size_bytes == MIB
    assert extent.read(0, 512) == DATA[:512]
    assert extent.status == "ok"


def test_another_file_under_the_name_is_neither_read_nor_written(path: Path) -> None:
    """Whoever put it there may want it whole; initiators have in memory what the old one held."""
    extent = File(str(path), 2 * MIB)
    extent.write(0, DATA)
    aside = path.rename(path.with_name("aside"))
    path.write_bytes(b"PRECIOUS")
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            extent.refresh()
        assert caught.value.errno == errno.ESTALE
        assert "adopt" in extent.status
        with pytest.raises(OSError):
            extent.write(0, DATA)
        assert extent.read_nowait(0, 4096) is None
        assert path.read_bytes() == b"PRECIOUS"
    aside.replace(path)
    assert extent.refresh().size_bytes == 2 * MIB
    assert extent.status == "ok"
    assert extent.read(0, MIB) == DATA


def test_a_file_that_was_cut_off_meanwhile_is_not_filled_with_zeros(path: Path) -> None:
    size = path.stat().st_size
    with pytest.raises(OSError, match=f"cut off at {size} of {2 * size} bytes"):
        File(str(path), 2 * size, grow=False)
    assert path.stat().st_size == size
    assert File(str(path), size, grow=False).geometry.size_bytes == size
    assert File(str(path), 2 * size).geometry.size_bytes == path.stat().st_size == 2 * size


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda path: None, errno.ENOENT),
        (lambda path: path.mkdir(), errno.EISDIR),
        (lambda path: os.mkfifo(path), errno.EINVAL),
    ],
)
def test_only_a_regular_file_can_be_opened(tmp_path: Path, make: object, number: int) -> None:
    path = tmp_path / "it"
    make(path)  # type: ignore[operator]
    with pytest.raises(OSError) as caught:
        File(str(path), read_only=True)
    assert caught.value.errno == number


@requires_loop_devices
def test_a_full_file_system_fails_the_write_and_recovers(tmp_path: Path) -> None:
    with file_system(tmp_path, ["mkfs.ext4", "-q", "-m", "0"], 24 * MIB) as mounted:
        path = mounted / "disk.img"
        path.touch()
        extent = File(str(path), 256 * MIB)
        ballast = mounted / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * MIB)
        with pytest.raises(OSError) as caught:
            for at in range(0, 256 * MIB, MIB):
                extent.write(at, DATA)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as caught:
            for at in range(128 * MIB, 192 * MIB, CHUNK):
                assert extent.write_nowait(at, DATA[:CHUNK])
        assert caught.value.errno == errno.ENOSPC
        assert extent.status == "ok"
        assert extent.read(0, MIB) == DATA
        assert extent.space().available < MIB
        hole = extent.read_nowait(200 * MIB, 4096) or extent.read(200 * MIB, 4096)
        assert sent(hole) == bytes(4096)
        ballast.unlink()
        extent.write(128 * MIB, DATA)
        extent.flush()
        assert extent.read(128 * MIB, MIB) == DATA
        extent.close()
        del hole, caught  # a view, and a traceback with a descriptor in its frames: both keep the file open


@requires_loop_devices
def test_copies_within_a_reflinking_file_system_share_their_blocks(tmp_path: Path) -> None:
    with file_system(tmp_path, ["mkfs.xfs", "-q", "-m", "reflink=1"], 320 * MIB) as mounted:
        names = ("source", "destination")
        for name in names:
            (mounted / name).touch()
        source, destination = (File(str(mounted / name), 128 * MIB) for name in names)
        for at in range(0, 128 * MIB, MIB):
            source.write(at, DATA)
        source.flush()
        before = source.space().available
        destination.copy_from(source, 0, 0, 128 * MIB)
        destination.flush()
        assert before - source.space().available < 16 * MIB
        assert destination.read(64 * MIB, MIB) == DATA
        destination.write(64 * MIB, bytes(4096))
        assert source.read(64 * MIB, 4096) == DATA[:4096]
        source.close()
        destination.close()


def test_a_file_on_tmpfs_is_served_without_waiting() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    path = shm / f"iscsi-targetd-test-{os.getpid()}"
    path.touch()
    try:
        extent = File(str(path), MIB)
        assert extent.read_nowait(0, 4096) == bytes(4096)
        assert extent.write_nowait(100, b"x" * 100)
        assert extent.copy_nowait(0, 300) == bytes(100) + b"x" * 100 + bytes(100)
        extent.unmap(0, 4096)
        assert extent.read(0, 4096) == bytes(4096)
        extent.write(0, b"y" * MIB)
        extent.write_zeroes(512, 8192)
        assert extent.read(0, 16384) == b"y" * 512 + bytes(8192) + b"y" * (16384 - 8704)
        extent.close()
    finally:
        path.unlink()


# -- errors of write-back ---------------------------------------------------------------------------


def refuse(number: int) -> Any:
    def call(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_durable_write_that_is_told_an_error_of_write_back_counts_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whatever its errno: the kernel tells it once, and it may be about what others wrote."""
    extent = File(str(path))
    monkeypatch.setattr(os, "pwritev", refuse(number))
    with pytest.raises(OSError):
        extent.write(0, b"x" * 512, durable=True)
    assert extent.lost_writes == 1
    assert "may be lost" in extent.status


def test_a_durable_write_that_finds_no_space_loses_nothing_of_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extent = File(str(path))
    monkeypatch.setattr(os, "pwritev", refuse(errno.ENOSPC))
    monkeypatch.setattr(os, "pwrite", refuse(errno.ENOSPC))
    with pytest.raises(OSError):
        extent.write(0, b"x" * 512, durable=True)
    assert (extent.lost_writes, extent.status) == (0, "ok")


@pytest.mark.parametrize(("nfs", "lost"), [(True, 1), (False, 0)])
def test_where_plain_writes_are_told_of_write_back_they_count_too(
    path: Path, monkeypatch: pytest.MonkeyPatch, nfs: bool, lost: int
) -> None:
    if nfs:
        monkeypatch.setattr(linux, "file_system", lambda fd: linux.NFS)
    extent = File(str(path))
    monkeypatch.setattr(os, "pwrite", refuse(errno.ENOSPC))
    with pytest.raises(OSError):
        extent.write(0, b"x" * 512)
    assert extent.lost_writes == lost
