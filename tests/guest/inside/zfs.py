"""The daemon over volumes of a real ZFS pool, in an emulated PC with Debian's kernel and ZFS.

Most checks speak to the daemon by our own initiator, as the tests on the host do; one has the kernel's.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

from tests import cdbs
from tests.daemon import Disk, Reply
from tests.faults.kit import (
    BLOCK,
    CAPACITY_DATA_CHANGED,
    DATA_PROTECT,
    MEDIUM_ERROR,
    NOT_READY,
    UNIT_ATTENTION,
    Lun,
    lun_of,
    pattern,
    sense,
)
from tests.guest.inside import local_daemon
from tests.guest.inside.checks import check, require
from tests.guest.inside.iscsi import logged_in
from tests.guest.inside.local_daemon import PORTAL, LocalDaemon
from tests.guest.inside.shell import attempt, run, until

MIB: Final = 1 << 20
DISKS: Final = {"tank": 1024 * MIB, "small": 128 * MIB, "brim": 96 * MIB}
"""Of the machine: serial number → bytes. Each carries a pool of that name."""
WRITE_ERROR: Final = (0x0C, 0x00)
BIN: Final = Path("/run/zfs-bin")
CALLS: Final = BIN / "calls"
"""What the daemon has asked ``zfs`` and ``zpool``."""
WRAPPER: Final = f"""#!/bin/sh
echo "${{0##*/}} $*" >>{CALLS}
exec chroot /run/guest "/usr/sbin/${{0##*/}}" "$@"
"""
"""The daemon runs on the host's files, which have no ZFS: from there into the guest's, which have."""

_numbers = count(1)


def prepare() -> None:
    """The pools, and the daemon with ``zfs`` and ``zpool`` within its reach.

    It is started here: on an emulated PC that takes longer than a check may."""
    run("modprobe", "zfs")
    for name in DISKS:
        run("udevadm", "wait", "--timeout=150", f"/dev/disk/by-id/virtio-{name}")
        run("zpool", "create", "-O", "snapdev=visible", name, f"/dev/disk/by-id/virtio-{name}")
    Path("/run/guest").mkdir()
    run("mount", "--rbind", "/", "/run/guest")
    BIN.mkdir()
    for name in ("zfs", "zpool"):
        (BIN / name).write_text(WRAPPER)
        (BIN / name).chmod(0o755)
    # Our own initiator answers no NOP-In while a check does something else, which may take minutes here.
    daemon().expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_nopinint": 0})


def daemon() -> LocalDaemon:
    return local_daemon.daemon(programs=BIN)


def fresh(pool: str = "tank") -> str:
    """A volume's name that no check before had."""
    return f"{pool}/volume{next(_numbers)}"


def property_of(dataset: str, name: str) -> int:
    """A number, as ``zfs get`` has it once all that is under way is on the disk."""
    run("zpool", "sync")
    value = run("zfs", "get", "-Hp", "-o", "value", name, dataset).strip()
    return int(value) if value.isdigit() else 0


def extent(given: str, kind: str = "ZVOL", **more: Any) -> dict[str, Any]:
    """Fields of an extent over a volume."""
    return {
        "iscsi_target_extent_name": given.replace("/", "-").replace("@", "-").lstrip("-"),
        "iscsi_target_extent_type": kind,
        "iscsi_target_extent_disk": given,
        "iscsi_target_extent_path": "",
        "iscsi_target_extent_filesize": "0",
        **more,
    }


def ask(fields: dict[str, Any]) -> Reply:
    """The daemon's answer to an extent that may be refused."""
    return daemon().api("POST", "services/iscsi/extent/", fields)


def export(given: str, kind: str = "ZVOL", **more: Any) -> Disk:
    """A target with one LUN over a volume."""
    fields = extent(given, kind, **more)
    return daemon().create_disk(fields["iscsi_target_extent_name"], extent=fields)


@contextmanager
def volume(*flags: str, size: int = 64 * MIB, pool: str = "tank") -> Iterator[tuple[str, Disk]]:
    """A volume, exported: its name and the disk."""
    name = fresh(pool)
    run("zfs", "create", *flags, "-V", size, name)
    disk = export(name)
    yield name, disk
    daemon().forget(disk)
    # udev looks into a device that a writer has closed, and holds it meanwhile.
    until(f"{name} to be let go of", lambda: attempt("zfs", "destroy", "-r", name).status == 0)


def well(reply: Any, what: str) -> None:
    require(reply.good, f"{what}: {reply}")


def fill(lun: Lun, at: int, size: int) -> bytes:
    """Random bytes, written from byte ``at`` on; all of them durable."""
    content = os.urandom(size)
    for start in range(0, size, MIB):
        well(lun.write((at + start) // BLOCK, content[start : start + MIB]), "WRITE")
    well(lun.flush(), "SYNCHRONIZE CACHE")
    return content


def content_of(lun: Lun, at: int, size: int) -> bytes:
    parts = []
    for start in range(0, size, MIB):
        reply = lun.read((at + start) // BLOCK, min(MIB, size - start) // BLOCK)
        well(reply, "READ")
        parts.append(reply.data)
    return b"".join(parts)


# -- volumes and what they are --------------------------------------------------------------------

FORMS: Final = (
    # kind, how it is given, flags of zfs create, volblocksize, does it reserve its space
    ("ZFS Volume", "{}", ("-b", "4k"), 4096, True),
    ("ZVOL", "/dev/zvol/{}", ("-s", "-b", "16k"), 16384, False),
    ("Disk", "zvol/{}", ("-s", "-p"), 8192, False),
)


@check
def volumes_are_found_by_each_of_their_names() -> None:
    """Sparse or not, volblocksize 4, 8 and 16 KiB: size, physical block and UNMAP granularity are what `zfs`
    says; what is written through the daemon is what the device has."""
    for kind, form, flags, block_size, reserves in FORMS:
        name = fresh("tank/vm" if "-p" in flags else "tank")
        run("zfs", "create", *flags, "-V", 32 * MIB, name)
        disk = export(form.format(name), kind)
        shown = daemon().expect(200, "GET", f"services/iscsi/extent/{disk.extent_id}/")
        path = shown["iscsi_target_extent_path"]
        require(path == f"/dev/zvol/{name}", f"{kind} {form}: path {path}")
        require(property_of(name, "volblocksize") == block_size, "not the volume that was meant")
        require((property_of(name, "refreservation") > 0) == reserves, f"refreservation of {name}")
        with lun_of(daemon(), disk) as lun:
            require(lun.capacity() == 32 * MIB, f"{name}: capacity {lun.capacity()}")
            exponent = lun.do(cdbs.read_capacity16(), read=32).data[13] & 0x0F
            require(BLOCK << exponent == block_size, f"{name}: physical block {BLOCK << exponent}")
            limits = lun.do(cdbs.inquiry(0xB0), read=255).data
            granularity = int.from_bytes(limits[28:32], "big") * BLOCK
            require(granularity == block_size, f"{name}: UNMAP granularity {granularity}")
            content = fill(lun, 5 * MIB, 2 * MIB)
            require(content_of(lun, 5 * MIB, 2 * MIB) == content, f"{name}: READ is not what was written")
        run("blockdev", "--flushbufs", path)
        with Path(path).open("rb") as device:
            device.seek(5 * MIB)
            require(device.read(2 * MIB) == content, f"{name}: the device has something else")
        daemon().forget(disk)


@check
def device_of_a_new_volume_is_waited_for() -> None:
    """An extent on a volume that `zfs create` has just made, while udev has not named its device yet: the
    answer waits for the link under /dev/zvol, and is 201."""
    name = fresh()
    answers: list[Reply] = []
    run("udevadm", "control", "--stop-exec-queue")
    try:
        run("zfs", "create", "-V", 8 * MIB, name)
        require(not Path(f"/dev/zvol/{name}").exists(), "udev was not held")
        asking = threading.Thread(target=lambda: answers.append(ask(extent(name))))
        asking.start()
        until("the daemon to ask for the volume", lambda: name in CALLS.read_text())
        require(not answers, f"answered before there was a device: {answers}")
    finally:
        run("udevadm", "control", "--start-exec-queue")
    asking.join()
    require(answers[0].status == 201, answers[0])
    daemon().delete("extent", answers[0].json["id"])


@check
def volume_that_is_not_there_is_refused_in_the_words_of_zfs() -> None:
    """`dataset does not exist`; a file system is no volume; nothing is left behind."""
    answer = ask(extent("tank/none"))
    require(answer.status == 409 and "dataset does not exist" in answer.text, answer)
    run("zfs", "create", "tank/files")
    answer = ask(extent("tank/files"))
    require(answer.status == 409, answer)
    require("not a volume" in answer.text, answer)


@check
def volume_that_is_mounted_is_refused() -> None:
    """A volume with a mounted ext4: 409, the device is in use. (Not where: the daemon has another root.)"""
    name = fresh()
    run("zfs", "create", "-V", 16 * MIB, name)
    run("udevadm", "settle")
    run("mkfs.ext4", "-q", f"/dev/zvol/{name}")
    where = Path("/mnt/volume")
    where.mkdir()
    run("mount", f"/dev/zvol/{name}", where)
    try:
        answer = ask(extent(name))
    finally:
        run("umount", where)
        where.rmdir()
    require(answer.status == 409 and "in use" in answer.text, answer)


# -- space ----------------------------------------------------------------------------------------


@check
def unmap_gives_space_back() -> None:
    """UNMAP of what was written: `zfs get used` falls by as much. Of blocks in part: they read as zeros all
    the same."""
    with volume("-s", "-b", "16k") as (name, disk), lun_of(daemon(), disk) as lun:
        empty = property_of(name, "used")
        content = fill(lun, 0, 16 * MIB)
        full = property_of(name, "used")
        require(full - empty >= 16 * MIB, f"used {empty}, then {full}")
        parameters = cdbs.unmap_parameters([(8, 64)])  # one whole block of the volume, and parts of two
        well(lun.do(cdbs.unmap(len(parameters)), parameters), "UNMAP of parts of blocks")
        expected = content[: 8 * BLOCK] + bytes(64 * BLOCK) + content[72 * BLOCK : MIB]
        require(content_of(lun, 0, MIB) == expected, "not zeros, or more than that")
        parameters = cdbs.unmap_parameters([(0, 16 * MIB // BLOCK)])
        well(lun.do(cdbs.unmap(len(parameters)), parameters), "UNMAP")
        require(content_of(lun, 0, 16 * MIB) == bytes(16 * MIB), "what was unmapped is not zeros")
        left = property_of(name, "used")
        require(left <= empty + MIB, f"used {empty}, {full}, and {left} after UNMAP")


@check
def pool_that_runs_full() -> None:
    """A sparse volume in a pool that others have filled: a WRITE goes to the cache, and the flush that cannot
    bring it to the pool is MEDIUM ERROR; so is the next. What was there is read, another pool's LUN serves,
    and once there is room again all goes on."""
    with (
        volume("-s", pool="brim") as (_, disk),
        volume() as (_, other),
        lun_of(daemon(), disk) as lun,
        lun_of(daemon(), other) as elsewhere,
    ):
        content = fill(lun, 0, 2 * MIB)
        run("zfs", "create", "brim/files")
        attempt("dd", "if=/dev/urandom", "of=/brim/files/all", "bs=1M").refused("No space left")
        for lba in (8 * MIB // BLOCK, 9 * MIB // BLOCK):
            well(lun.write(lba, os.urandom(MIB)), "WRITE into the cache")
            require(sense(lun.flush()) == (MEDIUM_ERROR, WRITE_ERROR), "a flush with the pool full")
        require("may be lost" in daemon().status(disk), daemon().status(disk))
        require(content_of(lun, 0, 2 * MIB) == content, "not what was there")
        fill(elsewhere, 0, 2 * MIB)
        run("zfs", "destroy", "brim/files")
        run("zpool", "sync")
        content = fill(lun, 8 * MIB, 2 * MIB)
        require(content_of(lun, 8 * MIB, 2 * MIB) == content, "not what was written once there was room")


# -- what changes ---------------------------------------------------------------------------------


@check
def growth_of_a_volume_is_told_and_used() -> None:
    """`zfs set volsize` under a session: CAPACITY DATA HAS CHANGED, the new size, and the new blocks hold
    data."""
    with volume(size=16 * MIB) as (name, disk), lun_of(daemon(), disk) as lun:
        kept = fill(lun, 0, MIB)
        run("zfs", "set", f"volsize={48 * MIB}", name)
        told = until(
            "the new capacity",
            lambda: [one for one in [sense(lun.do(cdbs.test_unit_ready()))] if one[0] == UNIT_ATTENTION],
        )
        require(told == [(UNIT_ATTENTION, CAPACITY_DATA_CHANGED)], told)
        require(lun.capacity() == 48 * MIB, f"capacity {lun.capacity()}")
        beyond = fill(lun, 47 * MIB, MIB)
        require(content_of(lun, 47 * MIB, MIB) == beyond, "the new blocks")
        require(content_of(lun, 0, MIB) == kept, "the old blocks")


@check
def snapshot_is_read_and_never_written() -> None:
    """Refused unless it is read-only; then it serves what the volume held, whatever becomes of that, and a
    WRITE is DATA PROTECT."""
    with volume() as (name, disk), lun_of(daemon(), disk) as lun:
        before = fill(lun, 0, 2 * MIB)
        run("zfs", "snapshot", f"{name}@monday")
        answer = ask(extent(f"{name}@monday"))
        require(answer.status == 409 and "snapshot" in answer.text, answer)
        frozen = export(f"{name}@monday", iscsi_target_extent_ro=True)
        fill(lun, 0, 2 * MIB)
        with lun_of(daemon(), frozen) as old:
            require(content_of(old, 0, 2 * MIB) == before, "not what was there when the snapshot was taken")
            refused = old.write(0, pattern(1))
            require(sense(refused) == (DATA_PROTECT, (0x27, 0x00)), f"WRITE to a snapshot: {refused}")
        daemon().forget(frozen)


@check
def killed_daemon_leaves_what_it_flushed() -> None:
    """`kill -9` and a new daemon: the volume is free to be claimed, and holds all that a flush covered."""
    with volume("-s") as (_, disk):
        with lun_of(daemon(), disk) as lun:
            content = fill(lun, 0, 8 * MIB)
        ours = daemon()
        ours.kill9()
        ours.start()
        with lun_of(ours, disk) as lun:
            require(content_of(lun, 0, 8 * MIB) == content, "not what a flush had covered")


@check
def pool_that_is_imported_later_comes_back_by_itself() -> None:
    """`zpool export` is refused while a volume is served. A daemon that starts without the pool has the LUN
    not ready, for the reason that `zfs` gives, and serves it once the pool is imported."""
    with volume("-s", pool="small") as (_, disk):
        with lun_of(daemon(), disk) as lun:
            content = fill(lun, 0, MIB)
        attempt("zpool", "export", "small").refused("busy")
        ours = daemon()
        require(ours.terminate() == 0, "exit status after SIGTERM")
        run("zpool", "export", "small")
        ours.start()
        with Lun(ours, disk.iqn) as lun:
            require(lun.ready().read(0).sense_key == NOT_READY, "a LUN with no pool is ready")
            require("does not exist" in ours.status(disk), ours.status(disk))
            run("zpool", "import", "-d", "/dev/disk/by-id", "small")
            until("the LUN to come back", lambda: lun.ready().read(0).good)
            require(content_of(lun, 0, MIB) == content, "not what was written before")
            require(ours.status(disk) == "ok", ours.status(disk))


# -- the storage resources of the API -------------------------------------------------------------


@check
def volumes_are_made_and_destroyed_through_the_api() -> None:
    """`storage/volume/…` over the real `zfs`: pools and datasets; volumes made sparse and not, listed, grown
    under a session, not destroyed while they are served and then destroyed."""
    ours = daemon()
    pools = {pool["vol_name"]: pool for pool in ours.expect(200, "GET", "storage/volume/")}
    require(set(pools) == set(DISKS), f"pools {set(pools)}")
    require(all(pool["status"] == "HEALTHY" for pool in pools.values()), pools)
    dataset = ours.expect(200, "GET", "storage/dataset/tank/")
    require(dataset["mountpoint"] == "/tank" and int(dataset["avail"]) > 0, dataset)
    place = "storage/volume/tank/zvols/"
    for name, sparse in (("made", True), ("kept", False)):
        made = ours.expect(202, "POST", place, {"name": name, "volsize": "32M", "sparse": sparse})
        require(made["volsize"] == 32 * MIB, made)
        require((property_of(f"tank/{name}", "refreservation") == 0) == sparse, f"{name}: refreservation")
    again = ours.api("POST", place, {"name": "made", "volsize": "32M"})
    require("dataset already exists" in again.text, again)
    too_large = ours.api("POST", place, {"name": "huge", "volsize": "1T", "sparse": False})
    require(too_large.status == 400 and "space" in too_large.text, too_large)
    require(ours.api("GET", f"{place}huge/").status == 404, "a volume that could not be made")
    listed = {one["name"] for one in ours.expect(200, "GET", place)}
    require({"made", "kept"} <= listed and "files" not in listed, listed)
    disk = export("tank/made")
    with lun_of(ours, disk) as lun:
        fill(lun, 0, 4 * MIB)
        run("zpool", "sync")
        shown = ours.expect(200, "GET", f"{place}made/")
        require(shown["used"] >= 4 * MIB, shown)
        ours.expect(200, "PUT", f"{place}made/", {"volsize": "40M"})
        require(sense(lun.do(cdbs.test_unit_ready())) == (UNIT_ATTENTION, CAPACITY_DATA_CHANGED), "not told")
        require(lun.capacity() == 40 * MIB, f"capacity {lun.capacity()}")
    busy = ours.api("DELETE", f"{place}made/")
    require(busy.status == 400 and "busy" in busy.text, busy)
    ours.forget(disk)
    for name in ("made", "kept"):
        ours.expect(204, "DELETE", f"{place}{name}/")
        require(attempt("zfs", "list", f"tank/{name}").status != 0, f"tank/{name} is still there")


# -- the kernel's initiator -----------------------------------------------------------------------


@check
def linux_initiator_keeps_a_file_system_on_a_volume() -> None:
    """open-iscsi in the same machine: ext4 made, filled, checked after logout and login; files removed and
    `fstrim`: `zfs get used` falls."""
    where = Path("/mnt/ext4")
    with volume("-s", "-b", "4k", size=96 * MIB) as (name, disk):
        with logged_in(disk.iqn, PORTAL) as node:
            device = node.disk()
            run("mkfs.ext4", "-q", device)
            where.mkdir()
            run("mount", device, where)
            contents = {f"file{number}": os.urandom(4 * MIB) for number in range(6)}
            for file, content in contents.items():
                (where / file).write_bytes(content)
            run("umount", where)
        with logged_in(disk.iqn, PORTAL) as node:
            device = node.disk()
            run("e2fsck", "-fn", device)
            run("mount", device, where)
            for file, content in contents.items():
                require((where / file).read_bytes() == content, f"{file} is not what was written")
            full = property_of(name, "used")
            for file in list(contents)[1:]:
                (where / file).unlink()
            run("sync")
            run("fstrim", where)
            run("umount", where)
            where.rmdir()
            left = property_of(name, "used")
            require(full - left >= 18 * MIB, f"used {full}, and {left} after fstrim")


@check
def daemon_ends_well() -> None:
    """SIGTERM with volumes open: status 0, and no bug logged in all of the above."""
    with volume() as (_, disk):
        with lun_of(daemon(), disk) as lun:
            fill(lun, 0, MIB)
        ours = daemon()
        said = "\n".join(ours.lines[-60:])
        require(ours.terminate() == 0, said)
        require(not ours.tracebacks(), "\n".join(ours.lines[-200:]))
        ours.start()
