"""Small writes by way of the mapping: in the file at once, and never a fault."""

import errno
import os
import threading
from pathlib import Path

import pytest

from storage.file import File
from storage.mapping import PAGE, STORE_LIMIT, Mapping
from tests.media import small_tmpfs

SIZE = 1 << 20


def in_memory(path: Path) -> int:
    """A file all of whose pages are in the page cache; its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"\x11" * SIZE, 0)
    return fd


@pytest.mark.parametrize("length", [1, 512, PAGE, PAGE + 1, STORE_LIMIT])
def test_what_is_stored_is_in_the_file(tmp_path: Path, length: int) -> None:
    fd = in_memory(tmp_path / "f")
    mapping = Mapping(fd, SIZE, writable=True)
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
    assert not Mapping(fd, SIZE, writable=True).store(0, b"x" * PAGE)
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
    mapping = Mapping(fd, SIZE, writable=True)
    assert mapping.store(SIZE - PAGE, b"y" * PAGE)  # its chunk is known to be in memory now
    os.ftruncate(fd, SIZE - PAGE)
    assert not mapping.store(SIZE - PAGE, b"z" * PAGE)
    assert not mapping.store(SIZE - 2 * PAGE, b"z" * 2 * PAGE)
    os.close(fd)


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
