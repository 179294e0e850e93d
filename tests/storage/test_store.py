"""Small writes by way of the mapping: in the file at once, and never a fault."""

import errno
import os
import threading
from pathlib import Path

import pytest

from storage.file import File
from storage.mapped_writes import PRICE, REMEMBERED_S
from storage.mapping import PAGE, STORE_LIMIT, Mapping
from tests.media import file_system, requires_loop_devices, small_tmpfs

MIB = 1 << 20
SIZE = MIB


def in_memory(path: Path) -> int:
    """A file all of whose pages are in the page cache; its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"\x11" * SIZE, 0)
    return fd


def storable(fd: int) -> Mapping:
    """A writable mapping of a file that has just been written, and whose pages can be made writable."""
    mapping = Mapping(fd, SIZE, writable=True)
    mapping.wrote(0, SIZE)
    if not mapping.store(0, b"\x11"):
        pytest.skip("a page fault takes a single page with this kernel and file system")
    return mapping


@pytest.mark.parametrize("length", [1, 512, PAGE, PAGE + 1, STORE_LIMIT])
def test_what_is_stored_is_in_the_file(tmp_path: Path, length: int) -> None:
    fd = in_memory(tmp_path / "f")
    mapping = storable(fd)
    data = os.urandom(length)
    for offset in (0, 3, 5 * PAGE - 1, SIZE - length):
        assert mapping.store(offset, data)
        assert os.pread(fd, length + 2, max(offset - 1, 0))[min(offset, 1) :][:length] == data
    os.fsync(fd)
    os.close(fd)


def test_a_page_that_is_not_in_memory_is_not_stored_to(tmp_path: Path) -> None:
    """It would have to be read first, and the event loop would wait."""
    fd = os.open(tmp_path / "sparse", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    mapping = Mapping(fd, SIZE, writable=True)
    mapping.wrote(0, SIZE)
    assert not mapping.store(0, b"x" * PAGE)
    assert os.pread(fd, 8, 0) == bytes(8)
    os.close(fd)


def test_a_mapping_for_reading_stores_nothing(tmp_path: Path) -> None:
    fd = in_memory(tmp_path / "f")
    mapping = Mapping(fd, SIZE)
    assert not mapping.store(0, b"x")
    assert mapping.view.readonly
    assert Mapping(fd, SIZE, writable=True).view.readonly
    os.close(fd)


def test_a_file_cut_off_under_the_mapping_is_a_refusal_and_no_death(tmp_path: Path) -> None:
    """Touched from Python the page would be SIGBUS; the system call says EFAULT or a short count."""
    fd = in_memory(tmp_path / "f")
    mapping = storable(fd)
    assert mapping.store(SIZE - PAGE, b"y" * PAGE)  # its chunk is known to be in memory now
    os.ftruncate(fd, SIZE - PAGE)
    assert not mapping.store(SIZE - PAGE, b"z" * PAGE)
    assert not mapping.store(SIZE - 2 * PAGE, b"z" * 2 * PAGE)
    os.close(fd)


def test_nothing_is_stored_to_what_is_not_known_to_be_dirty(tmp_path: Path) -> None:
    """The page fault would make dirty, and send to the disk, far more than was written."""
    fd = in_memory(tmp_path / "f")
    os.fsync(fd)
    mapping = Mapping(fd, SIZE, writable=True)
    assert not mapping.store(0, b"x" * PAGE)
    mapping.wrote(0, PRICE - 1)
    assert not mapping.store(0, b"x" * PAGE)
    assert os.pread(fd, 8, 0) == b"\x11" * 8
    os.close(fd)


def test_after_a_flush_nothing_is_stored_until_as_much_has_been_written_again(tmp_path: Path) -> None:
    fd = in_memory(tmp_path / "f")
    mapping = storable(fd)
    os.fsync(fd)
    mapping.cleaned()
    assert not mapping.store(0, b"x")
    mapping.wrote(0, PRICE)
    assert mapping.store(0, b"y")
    assert os.pread(fd, 1, 0) == b"y"
    os.close(fd)


def test_what_the_kernel_has_written_back_by_itself_is_found_out(tmp_path: Path) -> None:
    fd = in_memory(tmp_path / "f")
    mapping = storable(fd)
    mapping.expire()
    assert mapping.store(0, b"x")  # it is looked at again, and all is as it was
    os.fsync(fd)
    mapping.expire()
    assert not mapping.store(0, b"x")
    mapping.wrote(0, PRICE)
    assert mapping.store(0, b"y")
    os.close(fd)


def test_what_was_written_long_ago_does_not_count(tmp_path: Path) -> None:
    fd = in_memory(tmp_path / "f")
    mapping = Mapping(fd, SIZE, writable=True)
    mapping.wrote(0, SIZE)
    for _ in range(REMEMBERED_S):
        mapping.expire()
    assert not mapping.store(0, b"x")
    os.close(fd)


def _written(place: Path) -> int:
    """Bytes that have gone to the device of a file system (Linux, Documentation/block/stat.rst)."""
    device = place.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(stat[6]) * 512


@requires_loop_devices
@pytest.mark.parametrize("make", [["mkfs.ext4", "-q"], ["mkfs.xfs", "-q"]], ids=["ext4", "xfs"])
def test_a_small_write_sends_little_more_than_itself_to_the_disk(tmp_path: Path, make: list[str]) -> None:
    """Stores through the mapping made whole folios dirty: 100 writes of 4 KiB sent 96 MiB to the disk."""
    count = 32
    with file_system(tmp_path, make, 320 * MIB) as place:
        path = place / "f"
        with path.open("wb", buffering=0) as file:
            for _ in range(count):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        os.sync()
        backend = File(str(path))
        for number in range(count):
            backend.read_nowait(number * MIB, MIB)
        before = _written(place)
        for number in range(count):
            assert backend.write_nowait(number * MIB + 5 * PAGE, b"w" * PAGE)
        backend.flush()
        assert _written(place) - before < 4 * count * PAGE + MIB  # a MiB: the file system's own
        backend.close()


def test_a_full_file_system_is_told_by_its_own_error(tmp_path: Path) -> None:
    """A hole whose zeros are in memory has no block yet: the store fails, and pwrite says why."""
    with small_tmpfs(tmp_path, 256 * 1024) as place:
        path = place / "f"
        path.touch()
        os.truncate(path, SIZE)
        backend = File(str(path), SIZE)
        filler = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError) as full:
            while True:
                os.write(filler, bytes(4096))
        assert full.value.errno == errno.ENOSPC
        os.close(filler)
        with pytest.raises(OSError) as refused:
            if not backend.write_nowait(0, b"w" * PAGE):
                backend.write(0, b"w" * PAGE)
        assert refused.value.errno == errno.ENOSPC
        backend.close()


def test_stores_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    """One set of pages is shared; who finds it in use goes by pwrite."""
    path = tmp_path / "f"
    os.close(in_memory(path))
    backend = File(str(path), SIZE)
    backend.write(0, bytes(SIZE))  # now some go through the mapping
    rounds = 300

    def write(number: int) -> None:
        for turn in range(rounds):
            data = bytes((number, turn % 256)) * (PAGE // 2)
            assert backend.write_nowait(number * PAGE, data)
            assert backend.read(number * PAGE, PAGE) == data

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = (rounds - 1) % 256
    for number in range(4):
        assert backend.read(number * PAGE, PAGE) == bytes((number, last)) * (PAGE // 2)
    backend.close()
