"""One file or device is one medium, by whatever name; and what was here before is known again."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.identity import Medium, Part, device_name, is_other, medium_of, trace_of
from tests.media import attach, detach, file_system, loop_device, requires_loop_devices

MIB = 1 << 20


def make(path: Path, size: int = 16 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make(tmp_path / "image")


def clash(one: object, other: object) -> bool:
    first, second = medium_of(str(one)), medium_of(str(other))
    assert first.clashes(second) == second.clashes(first)
    return first.clashes(second)


# -- files --------------------------------------------------------------------------------------------


def hard_link(image: Path) -> Path:
    path = image.with_name("hard")
    path.hardlink_to(image)
    return path


def symbolic_link(image: Path) -> Path:
    path = image.with_name("symbolic")
    path.symlink_to(image)
    return path


def linked_directory(image: Path) -> Path:
    directory = image.parent.with_name(image.parent.name + "-link")
    directory.symlink_to(image.parent)
    return directory / image.name


@pytest.mark.parametrize("name", [str, hard_link, symbolic_link, linked_directory])
def test_a_file_is_one_by_any_of_its_names(image: Path, name: Callable[[Path], object]) -> None:
    assert clash(image, name(image))


def test_a_bind_mount_shows_the_same_files(image: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    if subprocess.run(["mount", "--bind", str(tmp_path), str(there)], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        assert clash(image, there / image.name)
        assert clash(image.with_name("new"), there / "new")
    finally:
        subprocess.run(["umount", str(there)], check=True)


def test_two_files_of_one_file_system_are_two(image: Path) -> None:
    assert not clash(image, make(image.with_name("other")))


def test_two_names_of_a_file_that_is_not_there_yet_are_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert clash(tmp_path / "there/a/new", tmp_path / "link/a/new")
    assert not clash(tmp_path / "there/a/new", tmp_path / "there/b/new")
    (tmp_path / "dangling").symlink_to("there/new")
    assert clash(tmp_path / "there/new", tmp_path / "dangling")


# -- devices ------------------------------------------------------------------------------------------


@pytest.fixture
def node(image: Path) -> Iterator[str]:
    with loop_device(image) as made:
        yield made


@requires_loop_devices
def test_a_device_is_one_by_any_of_its_names(node: str, tmp_path: Path) -> None:
    link, twin = tmp_path / "by-id", tmp_path / "twin"
    link.symlink_to(node)
    os.mknod(twin, 0o60600, Path(node).stat().st_rdev)
    assert clash(node, link)
    assert clash(node, twin)


@requires_loop_devices
def test_a_loop_device_is_the_file_behind_it(node: str, image: Path) -> None:
    assert clash(node, image)
    assert clash(node, hard_link(image))
    assert not clash(node, make(image.with_name("other")))


@requires_loop_devices
def test_the_kernel_says_what_is_behind_a_loop_device_not_the_name_that_it_had(
    node: str, image: Path
) -> None:
    aside = image.rename(image.with_name("aside"))
    make(image)
    assert clash(node, aside)
    assert not clash(node, image)


@requires_loop_devices
def test_loop_devices_over_one_file_clash_where_their_ranges_do(image: Path) -> None:
    def attached(*options: str) -> str:
        command = ["losetup", "-f", "--show", *options, str(image)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    whole, low, high = attached(), attached("--sizelimit", str(8 * MIB)), attached("-o", str(8 * MIB))
    try:
        assert clash(whole, low) and clash(whole, high)
        assert not clash(low, high)
    finally:
        for each in (whole, low, high):
            detach(each)


@requires_loop_devices
def test_a_loop_device_over_a_device_is_that_device(node: str, image: Path) -> None:
    second = attach(Path(node))
    try:
        assert clash(second, node)
        assert clash(second, image)
    finally:
        detach(second)


@requires_loop_devices
def test_a_disk_clashes_with_its_partitions_and_they_not_with_each_other(node: str, image: Path) -> None:
    for number, first, count in (("1", "2048", "8192"), ("2", "10240", "8192")):
        if subprocess.run(["addpart", node, number, first, count], capture_output=True).returncode:
            pytest.skip("no partitions of loop devices here")
    try:
        assert clash(node, f"{node}p1") and clash(image, f"{node}p2")
        assert not clash(f"{node}p1", f"{node}p2")
    finally:
        for number in ("1", "2"):
            subprocess.run(["delpart", node, number], check=True)


@requires_loop_devices
def test_a_map_lies_on_its_devices_and_two_maps_on_one_are_two(node: str, image: Path) -> None:
    names = [f"targetd-test-{os.getpid()}-{number}" for number in (1, 2)]
    made = []
    try:
        for start, name in zip((0, 8192), names, strict=True):
            table = f"0 8192 linear {node} {start}"
            if subprocess.run(["dmsetup", "create", name, "--table", table], capture_output=True).returncode:
                pytest.skip("no device mapper here")
            made.append(name)
        first, second = (Path(f"/dev/mapper/{name}") for name in names)
        assert clash(first, node) and clash(first, image) and clash(second, node)
        assert not clash(first, second)
    finally:
        for name in made:
            subprocess.run(["dmsetup", "remove", name], check=True)


@requires_loop_devices
def test_a_file_lies_on_the_disk_of_its_file_system(tmp_path: Path) -> None:
    with file_system(tmp_path, ["mkfs.ext4", "-q", "-F"], 16 * MIB) as at:
        inside, beside = make(at / "inside", MIB), make(at / "beside", MIB)
        command = ["findmnt", "-n", "-o", "SOURCE", str(at)]
        disk = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert clash(inside, disk)
        assert not clash(inside, beside)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Part("disk", 1, start=0, end=10), Part("disk", 1, start=10, end=20), False),
        (Part("disk", 1, start=0, end=11), Part("disk", 1, start=10, end=20), True),
        (Part("disk", 1), Part("disk", 2), False),
        (Part("disk", 1), Part("file", 1), False),
    ],
)
def test_stretches_overlap_where_they_have_bytes_in_common(one: Part, other: Part, expected: bool) -> None:
    assert Medium((one,)).clashes(Medium((other,))) is expected
    assert Medium((one,)).clashes(Medium((), (other,))) is expected
    assert not Medium((), (one,)).clashes(Medium((), (other,))), "lying on the same disk is no clash"


# -- over restarts ------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """A file on ext4, which keeps inode numbers and times of birth."""
    with file_system(tmp_path, ["mkfs.ext4", "-q", "-F", "-I", "256"], 16 * MIB) as at:
        yield make(at / "image", MIB)


@requires_loop_devices
def test_a_file_is_known_again_whatever_was_done_to_it(kept: Path) -> None:
    before = trace_of(str(kept))
    kept.write_bytes(b"other contents, another size")
    assert not is_other(before, trace_of(str(kept)))
    kept.chmod(0o600)
    aside = kept.rename(kept.with_name("aside"))
    assert not is_other(before, trace_of(str(aside)))
    make(kept)
    assert is_other(before, trace_of(str(kept)))
    aside.replace(kept)
    assert not is_other(before, trace_of(str(kept)))


@requires_loop_devices
def test_a_file_whose_inode_number_was_given_again_is_another(kept: Path) -> None:
    before, inode = trace_of(str(kept)), kept.stat().st_ino
    kept.unlink()
    make(kept)
    assert kept.stat().st_ino == inode, "as ext4 does"
    assert is_other(before, trace_of(str(kept)))


@requires_loop_devices
def test_a_copy_on_another_file_system_is_taken_as_it_is_found(kept: Path, tmp_path: Path) -> None:
    """A restore on a new disk, a moved directory: it cannot be told, so nobody is locked out."""
    assert not is_other(trace_of(str(kept)), trace_of(str(make(tmp_path / "restored"))))


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ('{"disk": "wwid naa.5"}', '{"disk": "wwid naa.6"}', True),
        ('{"disk": "wwid naa.5"}', '{"disk": "wwid naa.5"}', False),
        ('{"disk": "wwid naa.5"}', '{"disk": ""}', False),
        ('{"disk": ""}', '{"disk": "wwid naa.5"}', False),
        ("what an older version kept", '{"disk": "wwid naa.5"}', False),
        ('{"disk": "wwid naa.5"}', '{"file system": "1", "inode": 5, "born": 6}', False),
    ],
)
def test_what_cannot_be_told_is_no_difference(was: str, now: str, expected: bool) -> None:
    assert is_other(was, now) is expected


@requires_loop_devices
def test_a_loop_device_has_no_name_that_outlives_a_boot(node: str) -> None:
    rdev = Path(node).stat().st_rdev
    assert device_name(rdev)
    assert not device_name(rdev, loops=False)
