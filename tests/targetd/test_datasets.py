"""Datasets of directory pools, on file systems that share blocks and that do not, and of ZFS by commands."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from targetd.datasets.directory import copy_sparse
from targetd.datasets.service import DatasetService
from targetd.interface import DatasetError, DatasetRequest
from targetd.volumes import Pools
from tests.media import file_system, requires_loop_devices

MB = 1 << 20


class MemoryRecords:
    """A store that outlives a service."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    async def put(self, name: str, value: bytes | None) -> None:
        if value is None:
            self.kept.pop(name, None)
        else:
            self.kept[name] = value

    async def items(self) -> dict[str, bytes]:
        return dict(self.kept)


@pytest.fixture
def records() -> MemoryRecords:
    return MemoryRecords()


@pytest.fixture
def service(tmp_path: Path, records: MemoryRecords) -> DatasetService:
    return DatasetService(Pools({"tank": tmp_path}), records)


def volume(name: str, **more: object) -> DatasetRequest:
    return DatasetRequest(**{"name": name, "kind": "VOLUME", "size_bytes": 4 * MB, "sparse": True, **more})  # type: ignore[arg-type]


async def names(service: DatasetService) -> list[str]:
    return [one.name for one in await service.datasets()]


async def refused(awaitable: object, error: int, words: str) -> None:
    with pytest.raises(DatasetError, match=words) as caught:
        await awaitable  # type: ignore[misc]
    assert caught.value.error == error


async def test_a_volume_needs_its_parents_or_makes_them(service: DatasetService, tmp_path: Path) -> None:
    await refused(service.create(volume("tank/a/b")), errno.ENOENT, "parent does not exist")
    made = await service.create(volume("tank/a/b", ancestors=True))
    assert (made.kind, made.size_bytes, made.pool, made.sparse) == ("VOLUME", 4 * MB, "tank", True)
    assert await names(service) == ["tank", "tank/a", "tank/a/b"]
    assert (tmp_path / "zvols" / "a" / "b").stat().st_mode & 0o777 == 0o600
    await refused(service.create(volume("tank/a/b")), errno.EEXIST, "already exists")
    await refused(service.create(volume("tank/a/b/c")), errno.EINVAL, "not a filesystem")
    await refused(service.create(volume("other/a")), errno.ENOENT, "pool does not exist")


@pytest.mark.parametrize(
    "name", ["tank/../x", "tank/.x", "tank//x", "tank/", "tank/zvols/x", "tank/ä", "tank/x@y"]
)
async def test_names_never_lead_out_of_the_pool(service: DatasetService, tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError):
        await service.create(volume(name, ancestors=True))
    assert not any(os.scandir(tmp_path))


async def test_sizes_are_multiples_of_the_block_size(service: DatasetService) -> None:
    made = await service.create(volume("tank/v", size_bytes=100_000, block_size=65536))
    assert (made.size_bytes, made.block_size) == (131072, 65536)
    await service.resize("tank/v", 131073)
    grown = await service.dataset("tank/v")
    assert grown is not None and grown.size_bytes == 196608


async def test_a_volume_that_is_not_sparse_has_its_space(service: DatasetService) -> None:
    made = await service.create(volume("tank/v", sparse=False))
    assert made.used >= 4 * MB and not made.sparse


async def test_more_than_there_is_is_refused_and_leaves_nothing(
    service: DatasetService, tmp_path: Path
) -> None:
    await refused(
        service.create(volume("tank/v", sparse=False, size_bytes=1 << 60)), errno.ENOSPC, "out of space"
    )
    assert not (tmp_path / "zvols" / "v").exists()


async def test_properties_outlive_the_service(
    service: DatasetService, tmp_path: Path, records: MemoryRecords
) -> None:
    await service.create(volume("tank/v", properties={"org:a": "1"}, comments="mine"))
    await service.describe("tank/v", None, {"org:b": "x" * 4000, "org:a": None})
    again = DatasetService(Pools({"tank": tmp_path}), records)
    await again.load()
    found = await again.dataset("tank/v")
    assert found is not None
    assert (dict(found.properties), found.comments) == ({"org:b": "x" * 4000}, "mine")


@pytest.mark.parametrize("key", ["nocolon", "Upper:case", "a:b c", "a:" + "b" * 300])
async def test_property_names_are_those_of_zfs(service: DatasetService, key: str) -> None:
    await service.create(volume("tank/v"))
    await refused(service.describe("tank/v", None, {key: "1"}), errno.EINVAL, "invalid user property")


async def test_a_volume_made_anew_has_nothing_of_the_one_before(
    service: DatasetService, tmp_path: Path
) -> None:
    await service.create(volume("tank/v", properties={"org:a": "1"}))
    (tmp_path / "zvols" / "v").unlink()
    assert await service.dataset("tank/v") is None
    assert dict((await service.create(volume("tank/v"))).properties) == {}


async def test_destroy_takes_children_and_snapshots_only_when_told(
    service: DatasetService, tmp_path: Path
) -> None:
    await service.create(volume("tank/a/v", ancestors=True))
    await service.snapshot("tank/a/v", "s", {}, in_use=False, recursive=False)
    await refused(service.destroy("tank/a/v", recursive=False), errno.EBUSY, "has snapshots")
    await refused(service.destroy("tank/a", recursive=False), errno.EBUSY, "has children")
    await refused(service.destroy("tank", recursive=True), errno.EINVAL, "the pool itself")
    await service.destroy("tank/a", recursive=True)
    assert await names(service) == ["tank"]
    assert await service.snapshots() == []
    await refused(service.destroy("tank/a", recursive=True), errno.ENOENT, "does not exist")


async def test_rename_takes_everything_below_along(service: DatasetService) -> None:
    await service.create(volume("tank/a/v", ancestors=True, properties={"org:a": "1"}))
    await service.snapshot("tank/a/v", "s", {"org:s": "2"}, in_use=False, recursive=False)
    await service.rename("tank/a", "tank/b")
    assert await names(service) == ["tank", "tank/b", "tank/b/v"]
    (snapshot,) = await service.snapshots("tank/b/v")
    assert (snapshot.full_name, dict(snapshot.properties)) == ("tank/b/v@s", {"org:s": "2"})
    await service.rename("tank/b/v", "tank/b/w")
    moved = await service.dataset("tank/b/w")
    assert moved is not None and dict(moved.properties) == {"org:a": "1"}
    assert [one.full_name for one in await service.snapshots()] == ["tank/b/w@s"]
    await refused(service.rename("tank/b", "tank/b/c"), errno.EINVAL, "below it")
    await refused(service.rename("tank/b/w", "other/w"), errno.EINVAL, "not within one pool")


def fill(path: Path, pieces: dict[int, bytes]) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        for at, data in pieces.items():
            os.pwrite(fd, data, at)
    finally:
        os.close(fd)


async def snapshot_story(service: DatasetService, directory: Path) -> None:
    """Snapshot, change, clone, roll back: each has what it must have."""
    file = directory / "zvols" / "v"
    await service.create(volume("tank/v"))
    fill(file, {0: b"a" * 8192, 2 * MB: b"b" * 8192})
    before = file.read_bytes()
    taken = await service.snapshot("tank/v", "s1", {"org:why": "test"}, in_use=False, recursive=False)
    assert (taken.full_name, taken.size_bytes, dict(taken.properties)) == (
        "tank/v@s1",
        4 * MB,
        {"org:why": "test"},
    )
    fill(file, {0: b"c" * 8192, 3 * MB: b"d" * 4096})
    clone = await service.clone("tank/v@s1", "tank/w", {"org:c": "1"})
    assert (clone.origin, clone.size_bytes) == ("tank/v@s1", 4 * MB)
    assert (directory / "zvols" / "w").read_bytes() == before
    inode = file.stat().st_ino
    await service.rollback("tank/v@s1")
    assert file.read_bytes() == before
    assert file.stat().st_ino == inode, "whoever has the file open must see the change"
    await refused(
        service.snapshot("tank/v", "s1", {}, in_use=False, recursive=False), errno.EEXIST, "already exists"
    )
    await service.snapshot("tank/v", "s2", {}, in_use=False, recursive=False)
    await refused(service.rollback("tank/v@s1"), errno.EBUSY, "more recent snapshots exist: s2")
    await service.promote("tank/w")
    assert [one.full_name for one in await service.snapshots()] == ["tank/v@s2", "tank/w@s1"]
    old, new = await service.dataset("tank/v"), await service.dataset("tank/w")
    assert old is not None and new is not None
    assert (old.origin, new.origin) == ("tank/w@s1", "")
    await service.rename_snapshot("tank/w@s1", "tank/w@first")
    old = await service.dataset("tank/v")
    assert old is not None and old.origin == "tank/w@first"
    await service.destroy_snapshot("tank/w@first", recursive=False)
    old = await service.dataset("tank/v")
    assert old is not None and old.origin == ""
    await refused(service.clone("tank/w@first", "tank/x", {}), errno.ENOENT, "does not exist")


async def test_snapshots_where_blocks_cannot_be_shared(service: DatasetService, tmp_path: Path) -> None:
    await snapshot_story(service, tmp_path)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    with file_system(tmp_path, ["mkfs.xfs", "-q"], 400 * MB) as directory:
        yield directory


@requires_loop_devices
async def test_snapshots_where_blocks_are_shared(shared: Path, records: MemoryRecords) -> None:
    service = DatasetService(Pools({"tank": shared}), records)
    await snapshot_story(service, shared)
    await service.create(volume("tank/large", size_bytes=64 * MB, sparse=False))
    free = os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize
    await service.snapshot("tank/large", "now", {}, in_use=True, recursive=False)
    left = os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize
    assert free - left < 8 * MB, "a snapshot shares its blocks"


async def test_a_copy_of_what_is_in_use_is_refused(service: DatasetService, tmp_path: Path) -> None:
    """A copy that takes time is of no moment: only an initiator that is logged out makes it right."""
    await service.create(volume("tank/v"))
    try:
        await service.snapshot("tank/v", "s", {}, in_use=True, recursive=False)
    except DatasetError as error:
        assert error.error == errno.EBUSY and "logged in" in str(error)
        assert await service.snapshots() == []
    else:
        assert await service.snapshots(), "this file system shares blocks"


async def test_snapshots_of_file_systems_are_refused_in_words(service: DatasetService) -> None:
    await service.create(DatasetRequest(name="tank/a"))
    await refused(
        service.snapshot("tank/a", "s", {}, in_use=False, recursive=False), errno.ENOTSUP, "volumes only"
    )


async def test_a_copy_has_its_name_only_when_it_is_whole(service: DatasetService, tmp_path: Path) -> None:
    await service.create(volume("tank/v", size_bytes=32 * MB))
    fill(tmp_path / "zvols" / "v", {8 * MB: os.urandom(16 * MB)})
    await service.snapshot("tank/v", "s", {}, in_use=False, recursive=False)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        assert not (tmp_path / "zvols" / "copy").exists()

    await service.copy("tank/v@s", "tank/copy", progress)
    assert (tmp_path / "zvols" / "copy").read_bytes() == (tmp_path / "zvols" / "v").read_bytes()
    assert (tmp_path / "zvols" / "copy").stat().st_blocks * 512 < 24 * MB, "holes stay holes"
    assert seen[-1] == (32 * MB, 32 * MB) and len(seen) > 2

    def stop(done: int, total: int) -> None:
        raise DatasetError(errno.ECANCELED, "aborted")

    await refused(service.copy("tank/v@s", "tank/other", stop), errno.ECANCELED, "aborted")
    assert not (tmp_path / "zvols" / "other").exists()
    assert not (tmp_path / ".copies").exists()


def test_a_sparse_copy_over_other_data_leaves_nothing_of_it(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.touch()
    os.truncate(source, 3 * MB)
    fill(source, {MB: b"s" * MB})
    target.write_bytes(b"t" * (2 * MB))
    reader, writer = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        copy_sparse(reader, writer, lambda done, total: None)
    finally:
        os.close(reader)
        os.close(writer)
    assert target.read_bytes() == source.read_bytes()


ZFS = """#!/bin/sh
echo "$(basename "$0") $*" >>"$(dirname "$0")/log"
case "$(basename "$0") $*" in
  "zpool list -H -o name") echo big ;;
  "zfs list -Hp -t filesystem,volume"*none) echo "cannot open: dataset does not exist" >&2; exit 1 ;;
  "zfs list -Hp -t filesystem,volume"*)
    [ "${7:-}" = big/v ] || printf 'big\\tfilesystem\\t1000\\t500\\t-\\t-\\t0\\t/big\\t-\\n'
    printf 'big/v\\tvolume\\t1000\\t56\\t8192\\t16384\\t0\\t-\\tbig/o@s\\n' ;;
  *"get -Hp -t filesystem,volume"*) printf 'big/v\\torg:a\\t1\\nbig/v\\tvolsize\\t8192\\n' ;;
  *"-t snapshot -o name"*)
    printf 'big/v@s\\t1700000000\\t5\\t6\\t8192\\n'
    [ ! -e "$(dirname "$0")/taken" ] || printf 'big/v@t\\t1700000000\\t5\\t6\\t8192\\n' ;;
  "zfs snapshot "*) touch "$(dirname "$0")/taken" ;;
  *"get -Hp -t snapshot"*) printf 'big/v@s\\torg:b\\t2\\n' ;;
  "zfs destroy big/v") echo "cannot destroy 'big/v': volume has dependent clones" >&2; exit 1 ;;
esac
"""


async def test_zfs_is_asked_through_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: MemoryRecords
) -> None:
    """zfs(8): -H without headings, -p exact numbers, tabs between; user properties by ``zfs set``."""
    for name in ("zfs", "zpool"):
        (tmp_path / name).write_text(ZFS)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    service = DatasetService(Pools({}), records)
    pool, found = await service.datasets()
    assert (pool.kind, pool.mountpoint, pool.available) == ("FILESYSTEM", "/big", 1000)
    assert (found.size_bytes, found.block_size, found.origin) == (8192, 16384, "big/o@s")
    assert dict(found.properties) == {"org:a": "1"}
    (snapshot,) = await service.snapshots()
    assert (snapshot.full_name, snapshot.created, dict(snapshot.properties)) == (
        "big/v@s",
        1700000000.0,
        {"org:b": "2"},
    )
    assert await service.dataset("big/none") is None
    await service.describe("big/v", "words", {"org:a": None, "org:c": "3"})
    await service.snapshot("big/v", "t", {"org:x": "y"}, in_use=True, recursive=True)
    await service.rollback("big/v@s")
    await service.promote("big/v")
    await refused(service.destroy("big/v", recursive=False), errno.EBUSY, "has dependent clones")
    asked = (tmp_path / "log").read_text().splitlines()
    for line in (
        "zfs set org:c=3 org.freenas:description=words big/v",
        "zfs inherit org:a big/v",
        "zfs snapshot -r -o org:x=y big/v@t",
        "zfs rollback big/v@s",
        "zfs promote big/v",
    ):
        assert line in asked
    assert records.kept == {}
