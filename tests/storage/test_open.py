"""Descriptions, creation and its undoing, and where file extents may live."""

import errno
import os
from pathlib import Path

import pytest

from storage.file import File
from storage.memory import Memory, Null
from storage.open import (
    INSIDE_A_ROOT,
    NOT_A_FILE,
    ROOT_ITSELF,
    ExtentSpec,
    PathError,
    create_file,
    open_backend,
    resolve_path,
)

MIB = 1 << 20


def test_each_kind_opens_its_backend(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    file = open_backend(ExtentSpec(kind="file", path=str(path)))
    assert isinstance(file, File)
    assert file.geometry.size_bytes == 4096
    assert isinstance(open_backend(ExtentSpec(kind="memory", size_bytes=MIB)), Memory)
    assert isinstance(open_backend(ExtentSpec(kind="null", size_bytes=MIB)), Null)
    with pytest.raises(ValueError, match="needs a size"):
        open_backend(ExtentSpec(kind="memory"))
    with pytest.raises(FileNotFoundError):
        open_backend(ExtentSpec(kind="device", path=str(tmp_path / "nothing")))


def test_a_missing_file_is_made_only_when_asked(tmp_path: Path) -> None:
    spec = ExtentSpec(kind="file", path=str(tmp_path / "a/b/disk"), size_bytes=MIB)
    with pytest.raises(FileNotFoundError):
        open_backend(spec)
    made = open_backend(ExtentSpec(kind="file", path=spec.path, size_bytes=MIB, create=True))
    assert made.geometry.size_bytes == MIB
    assert made.space().used == 0
    with pytest.raises(FileNotFoundError):
        open_backend(ExtentSpec(kind="file", path=str(tmp_path / "auto"), create=True))


def test_a_read_only_extent_makes_its_file_like_any_other(tmp_path: Path) -> None:
    spec = ExtentSpec(kind="file", path=str(tmp_path / "disk"), size_bytes=MIB, create=True, read_only=True)
    made = open_backend(spec)
    assert (made.geometry.size_bytes, made.capabilities.writable) == (MIB, False)
    assert made.read(0, 512) == bytes(512)


def test_an_empty_file_is_no_extent(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="empty"):
        open_backend(ExtentSpec(kind="file", path=str(tmp_path / "empty")))


def test_creation_makes_a_sparse_private_file_and_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "disk"
    created = create_file(path, 64 * MIB)
    status = path.stat()
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (64 * MIB, 0, 0o600)
    assert created.file == path
    assert created.directories == (tmp_path / "a", tmp_path / "a" / "b")


def test_an_existing_file_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"precious")
    for size in (4, 8, MIB):
        created = create_file(path, size)
        assert created.file is None
        created.undo()
        assert path.read_bytes() == b"precious"


def test_undo_takes_away_what_was_made_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    created = create_file(tmp_path / "a" / "b" / "c" / "disk", MIB)
    (tmp_path / "a" / "b" / "other").touch()
    created.undo()
    assert (tmp_path / "a" / "b" / "other").exists()
    assert not (tmp_path / "a" / "b" / "c").exists()


def test_undo_leaves_a_file_that_another_has_put_in_the_place(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    created = create_file(path, MIB)
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    other.replace(path)
    created.undo()
    assert path.read_bytes() == b"precious"


def test_a_creation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        create_file(tmp_path / "a" / "b" / "disk", 1 << 62)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def roots(tmp_path: Path) -> list[str]:
    """Two roots, one of them by a link, and what may be pointed at from inside."""
    for name in ("one", "real-two", "outside", "one/directory", "real-two/sub"):
        (tmp_path / name).mkdir()
    (tmp_path / "two").symlink_to(tmp_path / "real-two")
    (tmp_path / "one/file").touch()
    (tmp_path / "one/out").symlink_to(tmp_path / "outside")
    (tmp_path / "one/loop").symlink_to(tmp_path / "one/loop")
    (tmp_path / "one/across").symlink_to(tmp_path / "real-two/new")
    (tmp_path / "outside/in").symlink_to(tmp_path / "one/file")
    os.mkfifo(tmp_path / "one/fifo")
    return [str(tmp_path / "one"), str(tmp_path / "two")]


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("one/file", "one/file"),
        ("one/new", "one/new"),
        ("one/new/deep/er", "one/new/deep/er"),
        ("two/sub/new", "real-two/sub/new"),
        ("real-two/new", "real-two/new"),
        ("one/across", "real-two/new"),
        ("one/../one/file", "one/file"),
        ("one//file", "one/file"),
        ("outside/in", "one/file"),
    ],
)
def test_paths_inside_a_root_are_resolved(tmp_path: Path, roots: list[str], path: str, real: str) -> None:
    """api-semantics §6.1."""
    assert resolve_path(f"{tmp_path}/{path}", roots) == tmp_path / real


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("outside/file", INSIDE_A_ROOT),
        ("one/../outside/file", INSIDE_A_ROOT),
        ("one/out/file", INSIDE_A_ROOT),
        ("one/loop/file", INSIDE_A_ROOT),
        ("one-and-a-half", INSIDE_A_ROOT),
        ("one/nul\0", INSIDE_A_ROOT),
        ("one", ROOT_ITSELF),
        ("one/", ROOT_ITSELF),
        ("real-two", ROOT_ITSELF),
        ("one/directory", NOT_A_FILE),
        ("one/new/", NOT_A_FILE),
        ("one/fifo", NOT_A_FILE),
        ("one/file/below", "A part of the path is a file"),
        ("one/" + "x" * 300, "The path cannot be used: File name too long."),
    ],
)
def test_other_paths_are_refused_in_words(tmp_path: Path, roots: list[str], path: str, text: str) -> None:
    """api-semantics §6.1."""
    with pytest.raises(PathError, match=text.replace(".", r"\.")):
        resolve_path(f"{tmp_path}/{path}", roots)


@pytest.mark.parametrize("path", ["", "relative/file", "~/file", "./one/file"])
def test_a_path_must_be_absolute(roots: list[str], path: str) -> None:
    with pytest.raises(PathError, match="must reside inside"):
        resolve_path(path, roots)
