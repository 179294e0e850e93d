"""Taking the space of files: fallocate(2), what to do without it, and leaving room for others."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import storage.allocation
from storage import linux
from storage.allocation import take_space
from storage.open import ExtentSpec, allocate_file, open_backend

MIB = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A sparse file of 4 MiB."""
    number = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(number, 4 * MIB)
    yield number
    os.close(number)


@pytest.fixture
def no_fallocate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(linux, "fallocate", refuse)


def taken(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def ignore(done: int) -> None:
    pass


def test_all_space_is_taken_and_the_content_stays(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.allocation, "ALLOCATE_PIECE", MIB)
    os.pwrite(fd, b"precious", 2 * MIB)
    told: list[int] = []
    take_space(fd, 7 * MIB // 2, 4 * MIB, told.append)
    assert taken(fd) >= 7 * MIB // 2
    assert told[1:] == [MIB, 2 * MIB, 3 * MIB, 7 * MIB // 2]
    assert os.pread(fd, 8, 2 * MIB) == b"precious"
    assert os.fstat(fd).st_size == 4 * MIB


@pytest.mark.usefixtures("no_fallocate")
def test_without_fallocate_a_new_file_is_filled_with_zeros(fd: int) -> None:
    told: list[int] = []
    take_space(fd, 4 * MIB, 0, told.append)
    assert taken(fd) >= 4 * MIB
    assert told[-1] == 4 * MIB


@pytest.mark.usefixtures("no_fallocate")
def test_without_fallocate_nothing_is_written_below_the_end_that_a_file_had(fd: int) -> None:
    """A session may be writing there, and a zero that comes later would destroy what was answered GOOD."""
    with pytest.raises(OSError, match=r"fallocate\(2\)") as refused:
        take_space(fd, 8 * MIB, 4 * MIB, ignore)
    assert refused.value.errno == errno.EOPNOTSUPP
    assert taken(fd) == 0
    os.pwrite(fd, b"x" * 4 * MIB, 0)
    take_space(fd, 8 * MIB, 4 * MIB, ignore)
    assert os.pread(fd, 8 * MIB, 0) == b"x" * 4 * MIB + bytes(4 * MIB)
    take_space(fd, 8 * MIB, 8 * MIB, ignore)  # it is all there


def test_what_cannot_be_had_is_refused_before_anything_is_taken(fd: int) -> None:
    with pytest.raises(OSError, match="bytes free") as refused:
        take_space(fd, 1 << 50, 0, ignore)
    assert refused.value.errno == errno.ENOSPC
    assert taken(fd) == 0


def test_what_others_have_still_to_take_counts_as_gone(
    tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.statvfs_result((4096, 4096, 1 << 20, 40000, 40000, 1, 1, 1, 0, 255))  # 156 MiB of 4 GiB
    monkeypatch.setattr(os, "fstatvfs", lambda fd: free)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT, 0o600)
    refusals: list[OSError] = []

    def meanwhile(done: int) -> None:
        if not refusals:
            with pytest.raises(OSError, match="promised to other extents") as refused:
                take_space(other, 90 * MIB, 0, ignore)
            refusals.append(refused.value)
            with pytest.raises(OSError, match="already"):
                take_space(fd, 4 * MIB, 0, ignore)

    take_space(fd, 10 * MIB, 0, meanwhile)
    assert taken(other) == 0
    take_space(other, 90 * MIB, 0, ignore)
    os.close(other)


def test_it_stops_when_nobody_wants_it_any_more(fd: int) -> None:
    with pytest.raises(OSError) as refused:
        take_space(fd, 4 * MIB, 0, ignore, lambda: True)
    assert refused.value.errno == errno.ECANCELED


# -- with the file to be made --------------------------------------------------------------------------


def test_a_missing_file_is_made_and_what_failed_is_gone_again(tmp_path: Path) -> None:
    spec = ExtentSpec(kind="file", path=str(tmp_path / "a/disk"), size_bytes=MIB, create=True)
    created = allocate_file(spec, ignore)
    assert open_backend(spec).space().used >= MIB
    created.undo()
    assert list(tmp_path.iterdir()) == []
    huge = ExtentSpec(kind="file", path=spec.path, size_bytes=1 << 50, create=True)
    with pytest.raises(OSError):
        allocate_file(huge, ignore)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_there_is_kept_when_its_space_cannot_be_had(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"precious")
    with pytest.raises(OSError):
        allocate_file(ExtentSpec(kind="file", path=str(path), size_bytes=1 << 50, create=True), ignore)
    assert path.read_bytes() == b"precious"
