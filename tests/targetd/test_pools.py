"""Directory pools on a real file system, ZFS through commands that answer as zfs(8) does, and the daemon."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from targetd.interface import StorageError
from targetd.volumes import VOLUME_BLOCK, VOLUMES, Pools, volume_file
from tests.daemon import HOST, Daemon
from tests.initiator import SocketInitiator

ZVOLS = "storage/volume/tank/zvols/"
MB = 1 << 20


@pytest.fixture
def pools(tmp_path: Path) -> Pools:
    return Pools({"tank": tmp_path})


async def test_a_volume_is_a_sparse_file_that_nobody_else_reads(pools: Pools, tmp_path: Path) -> None:
    made = await pools.create("tank", "vm/disk-0", 64 * MB + 1, True)
    assert (made.name, made.size_bytes, made.used) == ("vm/disk-0", 64 * MB + VOLUME_BLOCK, 0)
    file = volume_file("/dev/zvol/tank/vm/disk-0", {"tank": tmp_path})
    assert file == tmp_path / VOLUMES / "vm" / "disk-0"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [volume.name for volume in await pools.volumes("tank")] == ["vm/disk-0"]
    assert (await pools.resize("tank", "vm/disk-0", 128 * MB)) == await pools.volume("tank", "vm/disk-0")
    assert file.stat().st_size == 128 * MB
    assert await pools.delete("tank", "vm/disk-0")
    assert not await pools.delete("tank", "vm/disk-0")
    assert not (tmp_path / VOLUMES / "vm").exists()


async def test_a_name_that_is_taken_is_said_as_zfs_says_it(pools: Pools, tmp_path: Path) -> None:
    """api-semantics §9.1: clients match on the text."""
    await pools.create("tank", "a", MB, True)
    (tmp_path / "set").mkdir()
    for name in ("a", "set"):
        with pytest.raises(StorageError, match="dataset already exists"):
            await pools.create("tank", name, MB, True)


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../b", "/etc/x", "a//b", "a b", ".hidden", "a/", "x" * 300]
)
async def test_no_name_leads_out_of_the_pool(pools: Pools, tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError):
        await pools.create("tank", name, MB, True)
    assert volume_file(f"/dev/zvol/tank/{name}", {"tank": tmp_path}) is None or len(name) == 300
    assert await pools.volume("tank", name) is None
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_a_link_in_the_pool_is_no_volume(pools: Pools, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (tmp_path / VOLUMES).mkdir()
    (tmp_path / VOLUMES / "v").symlink_to(secret)
    assert await pools.volume("tank", "v") is None
    assert await pools.volumes("tank") == []
    assert not await pools.delete("tank", "v")


async def test_a_full_disk_promises_nothing(pools: Pools) -> None:
    with pytest.raises(StorageError, match="No space"):
        await pools.create("tank", "big", 1 << 60, False)
    assert await pools.volumes("tank") == []


async def test_datasets_are_the_other_directories(pools: Pools, tmp_path: Path) -> None:
    (tmp_path / "home" / "a").mkdir(parents=True)
    await pools.create("tank", "v", MB, True)
    ((pool, children),) = await pools.pools()
    assert pool.name == pool.pool == "tank"
    assert [child.name for child in children] == ["tank/home"]
    found = await pools.dataset("tank/home/a")
    assert found is not None
    assert found.mountpoint == str(tmp_path / "home" / "a")
    for name in ("tank/none", "tank/zvols", "other", "tank/../x", "tank/home/.."):
        assert await pools.dataset(name) is None


ZFS = """#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in
  "list -H -o name") echo big ;;
  "list -H -o health big") echo ONLINE ;;
  *"-t filesystem -d 0"*big) printf 'big\\t1000\\t500\\t/big\\n' ;;
  *"-t filesystem -d 1"*big) printf 'big\\t1000\\t500\\t/big\\nbig/home\\t1000\\t7\\t/big/home\\n' ;;
  *"-t volume"*"-r big"|*"-t volume"*big/v) printf 'big/v\\t8192\\t56\\t1000\\n' ;;
  list*) echo "cannot open: dataset does not exist" >&2; exit 1 ;;
  *) [ "$1" != destroy ] || { echo "cannot destroy 'big/v': dataset is busy" >&2; exit 1; } ;;
esac
"""


async def test_zfs_is_asked_through_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zfs(8): -H without headings, -p exact numbers, tabs between."""
    for name in ("zfs", "zpool"):
        (tmp_path / name).write_text(ZFS)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pools = Pools({})
    ((pool, children),) = await pools.pools()
    assert (pool.name, pool.available, pool.used, pool.status) == ("big", 1000, 500, "HEALTHY")
    assert [child.name for child in children] == ["big/home"]
    (volume,) = await pools.volumes("big")
    assert (volume.name, volume.size_bytes, volume.used, volume.available) == ("v", 8192, 56, 1000)
    assert await pools.volume("big", "none") is None
    with pytest.raises(StorageError, match="already exists"):
        await pools.create("big", "v", MB, True)
    await pools.resize("big", "v", 10 * MB)
    with pytest.raises(StorageError, match="dataset is busy"):
        await pools.delete("big", "v")
    asked = (tmp_path / "zfs.log").read_text().splitlines()
    assert f"set volsize={10 * MB} big/v" in asked
    assert asked[-1] == "destroy big/v"


# -- Through the API, to an initiator ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("pool")
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), ["--pool", f"tank={directory}"]).start()
    yield daemon
    assert not daemon.tracebacks()
    assert daemon.terminate() == 0


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [
        ("10G", 10 << 30),
        ("500MiB", 500 * MB),
        ("1 GiB", 1 << 30),
        ("0.5 GiB", 512 * MB),
        (MB, MB),
        ("1mb", MB),
        # all decimals of a double, to the nearest byte and then up to whole blocks
        ("4.656612873077393 GiB", -(-5 * 10**9 // 16384) * 16384),
        ("0.0009765625 GiB", MB),
        (f"1.{'0' * 5000}GiB", 1 << 30),
    ],
)
def test_sizes_are_read_as_clients_write_them(tank: Daemon, size: object, bytes_: int) -> None:
    """api-semantics §9.1."""
    made = tank.expect(202, "POST", ZVOLS, {"name": "sized", "volsize": size})
    assert made["volsize"] == bytes_
    tank.expect(204, "DELETE", f"{ZVOLS}sized/", {"cascade": True})
    assert tank.api("GET", f"{ZVOLS}sized").status == 404


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"volsize": "1G"}, 409, "name"),
        ({"name": "x"}, 409, "volsize"),
        ({"name": "x", "volsize": "much"}, 409, "volsize"),
        ({"name": "x", "volsize": 0}, 409, "volsize"),
        ({"name": "../x", "volsize": "1M"}, 400, "invalid name"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(
    tank: Daemon, body: dict[str, object], status: int, part: str
) -> None:
    answer = tank.api("POST", ZVOLS, body)
    assert answer.status == status
    assert part in answer.text


def test_pools_and_datasets_tell_how_much_is_free(tank: Daemon) -> None:
    (pool,) = tank.expect(200, "GET", "storage/volume/")
    assert pool["vol_name"] == "tank"
    assert pool["avail"] > 0
    assert tank.expect(200, "GET", "storage/volume/tank/")["mountpoint"] == pool["mountpoint"]
    assert tank.expect(200, "GET", "storage/dataset/tank/")["pool"] == "tank"
    for path in ("storage/volume/none/", "storage/volume/none/zvols/", "storage/dataset/tank/none/"):
        assert tank.api("GET", path).status == 404


@pytest.mark.parametrize("form", ["zvol/tank/vm/disk", "/dev/zvol/tank/vm/disk"])
def test_a_volume_becomes_a_lun_grows_under_it_and_outlives_it(tank: Daemon, form: str) -> None:
    """SBC-3 §4.7: CAPACITY DATA HAS CHANGED; a busy volume stays."""
    tank.expect(202, "POST", ZVOLS, {"name": "vm/disk", "volsize": "1M"})
    assert "already exists" in tank.api("POST", ZVOLS, {"name": "vm/disk", "volsize": "1M"}).text
    disk = tank.create_disk(
        "vol",
        "0",
        extent={
            "iscsi_target_extent_type": "Disk",
            "iscsi_target_extent_disk": form,
            "iscsi_target_extent_path": "",
        },
    )
    with SocketInitiator((HOST, tank.portal_port)) as initiator:
        initiator.login(disk.iqn)
        initiator.command(bytes(6))
        data = os.urandom(512)
        assert initiator.command(bytes.fromhex("2A000000000100000100"), data).good
        tank.expect(200, "PUT", f"{ZVOLS}vm/disk/", {"volsize": "2M"})
        assert initiator.command(bytes(6)).additional_sense == (0x2A, 0x09)
        last = initiator.command(bytes.fromhex("25") + bytes(9), read=8).data[:4]
        assert int.from_bytes(last, "big") == 2 * MB // 512 - 1
        assert bytes(initiator.command(bytes.fromhex("28000000000100000100"), read=512).data) == data
        busy = tank.api("DELETE", f"{ZVOLS}vm/disk/")
        assert (busy.status, "dataset is busy" in busy.text) == (400, True)
        assert tank.api("PUT", f"{ZVOLS}vm/disk/", {"volsize": "1M"}).status == 400
        initiator.logout()
    tank.restart()
    with SocketInitiator((HOST, tank.portal_port)) as initiator:
        initiator.login(disk.iqn)
        initiator.command(bytes(6))
        assert bytes(initiator.command(bytes.fromhex("28000000000100000100"), read=512).data) == data
    tank.delete("target", disk.target_id)
    tank.delete("extent", disk.extent_id)
    tank.expect(204, "DELETE", f"{ZVOLS}vm/disk/")


def test_an_extent_on_a_volume_that_is_not_there_says_so(tank: Daemon) -> None:
    """api-semantics §6.1."""
    body = {
        "iscsi_target_extent_name": "x",
        "iscsi_target_extent_type": "Disk",
        "iscsi_target_extent_disk": "zvol/tank/none",
    }
    answer = tank.expect(409, "POST", "services/iscsi/extent/", body)
    assert answer == {"iscsi_target_extent_disk": ['Zvol "tank/none" does not exist']}
