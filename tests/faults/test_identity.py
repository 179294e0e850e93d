"""One file or device is one extent by whatever name; the daemon's own files are none; and nothing that was
put in the place of a medium is taken for it."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon, Disk
from tests.faults.kit import (
    MEDIUM_MAY_HAVE_CHANGED,
    MEDIUM_NOT_PRESENT,
    NOT_READY,
    eventually,
    lun_of,
    pattern,
    sense,
    status_of,
)
from tests.media import loop_device, requires_loop_devices

MIB = 1 << 20
EXTENT = "services/iscsi/extent/"
PATH = "iscsi_target_extent_path"


def body(name: str, type: str, path: object, **fields: Any) -> dict[str, Any]:
    values = {"name": name, "type": type, "path": str(path), "filesize": "0", **fields}
    return {f"iscsi_target_extent_{key}": value for key, value in values.items()}


def make(path: Path, size: int = 8 * MIB) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def remove(daemon: Daemon, *ids: int) -> None:
    for id in ids:
        daemon.delete("extent", id)


# -- the names that one medium may have: (type, path) of an extent on the first and on the second -------

Two = tuple[tuple[str, Path], tuple[str, Path]]


@contextmanager
def the_same_path_roundabout(image: Path) -> Iterator[Two]:
    yield ("File", image), ("File", image.parent / "." / ".." / image.parent.name / image.name)


@contextmanager
def a_hard_link(image: Path) -> Iterator[Two]:
    link = image.with_name("hard")
    link.hardlink_to(image)
    yield ("File", image), ("File", link)


@contextmanager
def a_symbolic_link(image: Path) -> Iterator[Two]:
    link = image.with_name("symbolic")
    link.symlink_to(image)
    yield ("File", image), ("File", link)


@contextmanager
def a_link_to_its_directory(image: Path) -> Iterator[Two]:
    link = image.parent.with_name(f"{image.parent.name}-link")
    link.symlink_to(image.parent)
    yield ("File", image), ("File", link / image.name)


@contextmanager
def a_bind_mount(image: Path) -> Iterator[Two]:
    there = image.parent.with_name(f"{image.parent.name}-bound")
    there.mkdir()
    if subprocess.run(["mount", "--bind", str(image.parent), str(there)], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        yield ("File", image), ("File", there / image.name)
    finally:
        subprocess.run(["umount", str(there)], check=True)


@contextmanager
def a_link_to_a_device(image: Path) -> Iterator[Two]:
    with loop_device(image) as node:
        link = image.with_name("by-id")
        link.symlink_to(node)
        yield ("Disk", Path(node)), ("Disk", link)


@contextmanager
def another_node_of_a_device(image: Path) -> Iterator[Two]:
    with loop_device(image) as node:
        twin = image.with_name("twin")
        os.mknod(twin, 0o60600, Path(node).stat().st_rdev)
        yield ("Disk", Path(node)), ("Disk", twin)


@contextmanager
def the_file_behind_a_loop_device(image: Path) -> Iterator[Two]:
    with loop_device(image) as node:
        yield ("Disk", Path(node)), ("File", image)


@contextmanager
def a_loop_device_over_a_file(image: Path) -> Iterator[Two]:
    with loop_device(image) as node:
        yield ("File", image), ("Disk", Path(node))


@contextmanager
def two_loop_devices_over_one_file(image: Path) -> Iterator[Two]:
    with loop_device(image) as one, loop_device(image) as other:
        yield ("Disk", Path(one)), ("Disk", Path(other))


@contextmanager
def a_partition_of_a_disk(image: Path) -> Iterator[Two]:
    with loop_device(image) as node:
        if subprocess.run(["addpart", node, "1", "2048", "4096"], capture_output=True).returncode:
            pytest.skip("no partitions of loop devices here")
        try:
            yield ("Disk", Path(node)), ("Disk", Path(f"{node}p1"))
        finally:
            subprocess.run(["delpart", node, "1"], check=True)


NAMES = (
    *(the_same_path_roundabout, a_hard_link, a_symbolic_link, a_link_to_its_directory, a_bind_mount),
    *(a_link_to_a_device, another_node_of_a_device, the_file_behind_a_loop_device, a_loop_device_over_a_file),
    *(two_loop_devices_over_one_file, a_partition_of_a_disk),
)


@pytest.fixture
def image(shared_daemon: Daemon) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir=shared_daemon.extent_root))
    yield make(directory / "image")
    shutil.rmtree(directory)
    for each in shared_daemon.extent_root.glob(f"{directory.name}-*"):
        if each.is_symlink():
            each.unlink()
        else:
            each.rmdir()


@requires_loop_devices
@pytest.mark.parametrize("names", NAMES, ids=lambda names: names.__name__)
def test_two_names_of_one_medium_are_not_two_extents(
    shared_daemon: Daemon, image: Path, names: Callable[[Path], Any]
) -> None:
    """At create and at edit; two extents that only read may share."""
    daemon = shared_daemon
    other = make(image.with_name("other"))
    with names(image) as (first, second), ExitStack() as made:
        one = daemon.expect(201, "POST", EXTENT, body("one", *first))["id"]
        made.callback(daemon.delete, "extent", one)
        refused = daemon.expect(409, "POST", EXTENT, body("two", *second))
        assert list(refused) == [PATH]
        two = daemon.expect(201, "POST", EXTENT, body("two", "File", other))["id"]
        made.callback(daemon.delete, "extent", two)
        change = {
            f"iscsi_target_extent_{key}": str(value)
            for key, value in zip(("type", "path"), second, strict=True)
        }
        refused = daemon.expect(409, "PUT", f"{EXTENT}{two}/", change)
        assert list(refused) == [PATH]
        shown = daemon.expect(200, "GET", f"{EXTENT}{two}/")
        assert (shown[PATH], shown["iscsi_target_extent_status"]) == (str(other), "ok")
    assert image.stat().st_size == 8 * MIB


@pytest.mark.parametrize("names", [a_hard_link, a_symbolic_link], ids=lambda names: names.__name__)
def test_what_nobody_writes_may_be_shown_twice(
    shared_daemon: Daemon, image: Path, names: Callable[[Path], Any]
) -> None:
    daemon = shared_daemon
    with names(image) as (first, second):
        ids = [
            daemon.expect(201, "POST", EXTENT, body(name, *each, ro=True))["id"]
            for name, each in (("one", first), ("two", second))
        ]
        assert list(daemon.expect(409, "PUT", f"{EXTENT}{ids[0]}/", {"iscsi_target_extent_ro": False})) == [
            PATH
        ]
        remove(daemon, *ids)


def test_the_file_of_another_extent_is_not_grown_before_that_is_noticed(
    shared_daemon: Daemon, image: Path
) -> None:
    daemon = shared_daemon
    one = daemon.expect(201, "POST", EXTENT, body("one", "File", image))["id"]
    image.with_name("hard").hardlink_to(image)
    daemon.expect(409, "POST", EXTENT, body("two", "File", image.with_name("hard"), filesize="16MB"))
    assert image.stat().st_size == 8 * MIB
    remove(daemon, one)


# -- at the start --------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "d").start()
    yield daemon
    daemon.kill9()
    assert not daemon.tracebacks()


def reads(daemon: Daemon, disk: Disk) -> tuple[int | None, tuple[int, int] | None]:
    with lun_of(daemon, disk) as lun:
        return sense(lun.read(0))


READY = (None, None)
ABSENT = (NOT_READY, MEDIUM_NOT_PRESENT)


def test_extents_that_have_become_one_medium_while_nobody_looked(daemon: Daemon) -> None:
    """The LUN is there and not ready, and the API says why; the older extent has it, at every start."""
    one, two = daemon.create_disk("one", "1MB"), daemon.create_disk("two", "1MB")
    aside = two.path.with_name("aside")
    for _ in range(2):
        assert daemon.terminate() == 0
        if not aside.exists():
            two.path.rename(aside)
            two.path.hardlink_to(one.path)
        daemon.start()
        assert status_of(daemon, one.extent_id) == "ok"
        assert status_of(daemon, two.extent_id) != "ok"
        assert (reads(daemon, one), reads(daemon, two)) == (READY, ABSENT)
    aside.replace(two.path)
    eventually(lambda: status_of(daemon, two.extent_id) == "ok", "its own file is back")
    assert reads(daemon, two) == READY


def test_a_file_that_was_replaced_while_the_daemon_was_down_is_not_taken(daemon: Daemon) -> None:
    disk = daemon.create_disk("disk", "1MB")
    with lun_of(daemon, disk) as lun:
        assert lun.write(0, pattern(1)).good
    assert daemon.terminate() == 0
    aside = disk.path.rename(disk.path.with_name("aside"))
    disk.path.write_bytes(b"PRECIOUS" * MIB)  # large enough: nothing would have to be grown
    daemon.start()
    assert "adopt" in status_of(daemon, disk.extent_id)
    assert reads(daemon, disk) == ABSENT
    aside.replace(disk.path)
    eventually(lambda: status_of(daemon, disk.extent_id) == "ok", "its file is back")
    with lun_of(daemon, disk) as lun:
        assert lun.read(0).data == pattern(1)


def test_a_file_that_was_cut_off_while_the_daemon_was_down_is_not_filled_with_zeros(daemon: Daemon) -> None:
    disk = daemon.create_disk("disk", "1MB")
    assert daemon.terminate() == 0
    os.truncate(disk.path, 4096)
    daemon.start()
    assert status_of(daemon, disk.extent_id) == f"the file has been cut off at 4096 of {MIB} bytes"
    assert disk.path.stat().st_size == 4096
    daemon.expect(200, "POST", f"{EXTENT}{disk.extent_id}/adopt/")
    assert disk.path.stat().st_size == MIB
    assert reads(daemon, disk) == READY


def test_a_copied_state_directory_takes_its_files_as_it_finds_them(daemon: Daemon, tmp_path: Path) -> None:
    """A restored backup, a rebuilt node: every inode is another, and nobody is to be asked for each disk."""
    disk = daemon.create_disk("disk", "1MB")
    with lun_of(daemon, disk) as lun:
        assert lun.write(0, pattern(1)).good
    assert daemon.terminate() == 0
    for name in ("state", "extents"):
        aside = (daemon.directory / name).rename(daemon.directory / f"{name}-aside")
        shutil.copytree(aside, daemon.directory / name)
    daemon.start()
    assert status_of(daemon, disk.extent_id) == "ok"
    with lun_of(daemon, disk) as lun:
        assert lun.read(0).data == pattern(1)
    assert daemon.wait_for_line("copied or moved")
    daemon.terminate()
    shutil.copy(disk.path, disk.path.with_name("other"))
    disk.path.with_name("other").replace(disk.path)
    daemon.start()
    assert "adopt" in status_of(daemon, disk.extent_id), "and they are known from then on"


# -- replaced under a session --------------------------------------------------------------------------


def test_a_replaced_file_is_taken_when_an_operator_says_so(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    disk, beside = daemon.create_disk("replaced", "1MB"), daemon.create_disk("beside", "1MB")
    path = f"{EXTENT}{disk.extent_id}/"
    with lun_of(daemon, disk) as lun, lun_of(daemon, beside) as other:
        assert lun.write(0, pattern(1)).good
        aside = disk.path.rename(disk.path.with_name("replaced-aside"))
        disk.path.write_bytes(b"PRECIOUS")
        eventually(lambda: sense(lun.read(0)) == ABSENT, "it is noticed")
        assert "adopt" in status_of(daemon, disk.extent_id)
        assert disk.path.read_bytes() == b"PRECIOUS"
        assert other.read(0).good
        # an edit of something else does not take it either
        refused = daemon.expect(409, "PUT", f"{path}?force=1", {"iscsi_target_extent_filesize": "2MB"})
        assert "adopt" in str(refused)
        assert disk.path.read_bytes() == b"PRECIOUS"
        daemon.expect(200, "POST", f"{path}adopt/")
        lun.ready()
        assert MEDIUM_MAY_HAVE_CHANGED in lun.attentions
        assert lun.read(0).data[:8] == b"PRECIOUS"
        assert disk.path.stat().st_size == MIB
        assert status_of(daemon, disk.extent_id) == "ok"
        daemon.expect(200, "POST", f"{path}adopt/")
        assert lun.read(0).good, "nothing to do"
    assert aside.stat().st_size == MIB
    daemon.delete_disk(disk)
    daemon.delete_disk(beside)
    aside.unlink()


def test_what_another_extent_has_is_not_taken_even_when_told(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    one, two = daemon.create_disk("one", "1MB"), daemon.create_disk("two", "1MB")
    two.path.unlink()
    two.path.hardlink_to(one.path)
    refused = daemon.expect(409, "POST", f"{EXTENT}{two.extent_id}/adopt/")
    assert list(refused) == ["__all__"]
    assert daemon.api("POST", f"{EXTENT}999999/adopt/").status == 404
    daemon.delete_disk(two)
    one.path.unlink(missing_ok=True)
    daemon.delete_disk(one)


@pytest.mark.parametrize("replaced", [False, True])
def test_only_the_file_that_the_extent_had_is_deleted_with_it(shared_daemon: Daemon, replaced: bool) -> None:
    daemon = shared_daemon
    disk = daemon.create_disk("deleted", "1MB")
    if replaced:
        disk.path.unlink()
        disk.path.write_bytes(b"PRECIOUS")
    daemon.delete("target", disk.target_id)
    assert daemon.api("DELETE", f"{EXTENT}{disk.extent_id}/", {"delete": True}).status == 204
    if replaced:
        daemon.wait_for_line("deleted", "it is left as it is")
        assert disk.path.read_bytes() == b"PRECIOUS"
        disk.path.unlink()
    else:
        eventually(lambda: not disk.path.exists(), "it is deleted")


def test_a_file_behind_a_link_is_deleted_with_the_link(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    file = make(daemon.extent_root / "behind", MIB)
    link = daemon.extent_root / "link"
    link.symlink_to(file)
    id = daemon.expect(201, "POST", EXTENT, body("linked", "File", link))["id"]
    assert daemon.api("DELETE", f"{EXTENT}{id}/", {"delete": True}).status == 204
    eventually(lambda: not os.path.lexists(link) and not file.exists(), "both are gone")


# -- what is the daemon's own --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose extents may be anywhere, with a password and options in files of their own."""
    directory = tmp_path_factory.mktemp("owner").resolve()
    (directory / "password").write_text("a password that is known here\n")
    (directory / "options.toml").write_text(
        f"api-password-file = {json.dumps(str(directory / 'password'))}\n"
    )
    options = ("--extent-root", str(directory), "--config", str(directory / "options.toml"))
    daemon = Daemon(directory, options=options)
    daemon.state_dir.mkdir()
    shutil.copy(directory / "password", daemon.state_dir / "api-password")  # for the tests' own requests
    daemon.start()
    yield daemon
    daemon.kill9()
    assert not daemon.tracebacks()


OWN = ("state/targetd.sqlite", "state/targetd.sqlite-wal", "state/targetd.sqlite.lock", "state/api-password",
       "password", "options.toml")  # fmt: skip


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "reached", ["by its name", "by a hard link", "by a symbolic link", "by a loop device"]
)
def test_the_daemons_own_files_are_no_extents(owner: Daemon, name: str, reached: str) -> None:
    own, link = owner.directory / name, owner.directory / "innocent.img"
    with ExitStack() as undo:
        kind, path = "File", link
        undo.callback(link.unlink, missing_ok=True)
        if reached == "by its name":
            path = own
        elif reached == "by a hard link":
            link.hardlink_to(own)
        elif reached == "by a symbolic link":
            link.symlink_to(own)
        else:
            made = subprocess.run(["losetup", "-f", "--show", str(own)], capture_output=True, text=True)
            if made.returncode:
                pytest.skip("no loop device over it")
            kind, path = "Disk", Path(made.stdout.strip())
            undo.callback(subprocess.run, ["losetup", "-d", str(path)], check=True)
        before = own.stat().st_size
        refused = owner.expect(409, "POST", EXTENT, body("innocent", kind, path))
        assert list(refused) == [PATH], refused
        assert own.stat().st_size >= before


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("state/new.img", False),
        ("state/deep/new.img", False),
        ("state/extents/new.img", True),
        ("new.img", True),
    ],
)
def test_new_files_are_not_made_in_the_state_directory(owner: Daemon, name: str, allowed: bool) -> None:
    path = owner.directory / name
    made = owner.api("POST", EXTENT, body("new", "File", path, filesize="1MB"))
    assert made.status == (201 if allowed else 409), made.text
    assert path.exists() is allowed
    if allowed:
        assert owner.api("DELETE", f"{EXTENT}{made.json['id']}/", {"delete": True}).status == 204


def test_an_extent_of_an_older_version_on_an_own_file_is_not_served(daemon: Daemon) -> None:
    """It is in the configuration, its LUN is there, and not ready; the file keeps its content."""
    disk = daemon.create_disk("disk", "1MB")
    assert daemon.terminate() == 0
    disk.path.unlink()
    disk.path.symlink_to(daemon.state_dir / "targetd.sqlite")
    daemon.start()
    assert "the daemon" in status_of(daemon, disk.extent_id)
    assert reads(daemon, disk) == ABSENT
    assert list(daemon.expect(409, "POST", f"{EXTENT}{disk.extent_id}/adopt/")) == ["__all__"]
