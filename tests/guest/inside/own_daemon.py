"""The daemon in the guest, over devices that fail, hang or are slow: each fault stays with its LUN.

Device mapper makes the faults, on loop devices over files in memory: ``error`` for a disk that is gone,
``flakey`` for one that takes no writes, a suspended map for one that does not answer, ``delay`` for one that
is slow. For single bad blocks that a write mends there is md's ``faulty``. The initiator is the guest's own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from tests.daemon import Disk
from tests.guest.inside import iscsi
from tests.guest.inside.checks import check, require
from tests.guest.inside.iscsi import Node, logged_in
from tests.guest.inside.load import Load
from tests.guest.inside.local_daemon import PORTAL, daemon, drop_caches
from tests.guest.inside.shell import Background, Ran, attempt, run, until

MIB = 1 << 20
SIZE = 32 * MIB
SECTORS = SIZE // 512
FAR_LBA = 24576
"""A block that nobody reads by himself: no partition table, no superblock, and no read ahead of one."""
MEDIUM_ERROR = 3
"""Exit status of sg3_utils for the sense keys MEDIUM ERROR and HARDWARE ERROR."""

_numbers = count(1)


def prepare() -> None:
    """The daemon is started here: on an emulated PC that takes longer than a check may."""
    run("modprobe", "-a", "dm-mod", "dm-delay", "dm-flakey", "faulty")
    daemon()


def fresh(what: str) -> str:
    """A name that no check before had, whatever it left."""
    return f"{what}{next(_numbers)}"


@contextmanager
def loop(name: str) -> Iterator[str]:
    """A loop device over a file in memory."""
    file = Path(f"/run/{name}.img")
    with file.open("wb") as made:
        made.truncate(SIZE)
    node = run("losetup", "--find", "--show", file).strip()
    yield node
    run("losetup", "--detach", node)
    file.unlink()


class Mapped:
    """A device-mapper device over a loop device; a table names that ``{0}``."""

    def __init__(self, name: str, below: str, table: str) -> None:
        self.name = name
        self.first_table = table
        self.below = below
        self.node = f"/dev/mapper/{name}"

    def create(self) -> None:
        run("dmsetup", "create", self.name, stdin=self._table(self.first_table))
        until(self.node, lambda: Path(self.node).exists())

    def remove(self) -> None:
        run("dmsetup", "remove", "--retry", self.name)

    def becomes(self, table: str) -> None:
        """Another table under whoever has it open; what is under way is not waited for."""
        run("dmsetup", "reload", self.name, stdin=self._table(table))
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)
        self.resume()

    def hang(self) -> None:
        """From now on nothing is answered, until ``resume``."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)

    def resume(self) -> None:
        run("dmsetup", "resume", self.name)

    def _table(self, table: str) -> bytes:
        return table.format(self.below).encode() + b"\n"


SOUND = f"0 {SECTORS} linear {{0}} 0"
GONE = f"0 {SECTORS} error"
TAKES_NO_WRITES = f"0 {SECTORS} flakey {{0}} 0 0 3600 1 error_writes"
SLOW = f"0 {SECTORS} delay {{0}} 0 500"


class WithBadBlocks:
    """A device of md's ``faulty`` (md(4)) over a loop device."""

    READ_FIXABLE, CLEAR_FAULTS = 5, 30
    """Layouts: the next read fails, and each after it of that place, until a write; none does any more."""

    def __init__(self, below: str) -> None:
        self.below = below
        self.node = next(node for n in count() if not Path(node := f"/dev/md{n}").exists())

    def create(self) -> None:
        run("mdadm", "--build", self.node, "--run", "--level=faulty", "--raid-devices=1", self.below)
        until(self.node, lambda: Path(self.node).exists())

    def remove(self) -> None:
        run("mdadm", "--stop", self.node)

    def spoil(self, lba: int) -> None:
        """Have this block be bad. Again, if somebody else had read another one first."""

        def bad() -> bool:
            self._layout(self.CLEAR_FAULTS)
            self._layout(self.READ_FIXABLE)
            self._read(lba)
            return self._read(lba).status != 0 and self._read(lba - 1).status == 0

        until(f"block {lba} to be bad", bad)

    def _read(self, lba: int) -> Ran:
        options = ("of=/dev/null", "iflag=direct", "bs=512", f"skip={lba}", "count=1")
        return attempt("dd", f"if={self.node}", *options)

    def _layout(self, number: int) -> None:
        Path(f"/sys/block/{Path(self.node).name}/md/layout").write_text(str(number))


@contextmanager
def lun_over(what: str, table: str = SOUND) -> Iterator[tuple[Mapped, Disk, Node, str]]:
    """A mapped device, exported by the daemon, logged in: the map, the disk, the node and ``/dev/sdX``."""
    name = fresh(what)
    with loop(name) as below:
        mapped = Mapped(name, below, table)
        with lun(name, mapped) as (disk, node):
            yield mapped, disk, node, node.disk()


@contextmanager
def lun(name: str, made: Mapped | WithBadBlocks) -> Iterator[tuple[Disk, Node]]:
    """A device that is created, exported by the daemon and logged in to; and taken away."""
    made.create()
    disk = daemon().device_disk(name, made.node)
    with logged_in(disk.iqn, PORTAL) as node:
        yield disk, node
    # Not where something failed: a session without its disk would only hide what.
    daemon().forget(disk)
    run("udevadm", "settle")
    made.remove()


@contextmanager
def sound_lun() -> Iterator[Load]:
    """Another LUN of the same daemon under verified load for the block: it must not notice a thing."""
    made = daemon().create_disk(fresh("sound"), "16MB")
    with logged_in(made.iqn, PORTAL) as node, Load(node.disk()) as load:
        load.goes_on()
        yield load
        load.stop()
    daemon().forget(made)


def read(device: str, lba: int, blocks: int = 8) -> Ran:
    """READ(16) of so many blocks past every cache of the initiator."""
    options = (f"if={device}", "of=/dev/null", "iflag=sgio", "bs=512", "cdbsz=16", "retries=0")
    return attempt("sg_dd", *options, f"skip={lba}", f"count={blocks}")


def write(device: str, lba: int, content: bytes, *flags: str) -> Ran:
    """WRITE(16)."""
    source = Path("/run/content")
    source.write_bytes(content)
    oflag = ",".join(["sgio", *flags])
    options = (f"if={source}", f"of={device}", f"oflag={oflag}", "bs=512", "cdbsz=16", "retries=0")
    return attempt("sg_dd", *options, f"seek={lba}", f"count={len(content) // 512}")


def well(ran: Ran, when: str) -> None:
    require(ran.status == 0, f"{when}: {ran}")


def content_of(device: str, lba: int, blocks: int) -> bytes:
    out = Path("/run/read-back")
    run("sg_dd", f"if={device}", "iflag=sgio", "bs=512", f"skip={lba}", f"count={blocks}", f"of={out}")
    return out.read_bytes()


# -- faults -------------------------------------------------------------------------------------


@check
def bad_block_is_a_medium_error_at_its_lba() -> None:
    """md's `faulty`: READ of a bad block is MEDIUM ERROR with its LBA, its neighbours can be read; a write
    mends it."""
    name = fresh("spoilt")
    with (
        sound_lun(),
        loop(name) as below,
        lun(name, spoilt := WithBadBlocks(below)) as (_, node),
    ):
        device = node.disk()
        before = os.urandom(64 * 512)
        well(write(device, FAR_LBA - 32, before), "WRITE before the block is bad")
        run("sg_sync", device)
        drop_caches()
        spoilt.spoil(FAR_LBA)
        cdb = [f"{byte:02x}" for byte in b"\x88\x00" + FAR_LBA.to_bytes(8, "big") + b"\0\0\0\x01\0\0"]
        said = attempt("sg_raw", "--request=512", device, *cdb).refused("Medium Error")
        require("read error" in said.lower(), said)
        require(f"{FAR_LBA:x}" in said.replace("0x", "").lower(), f"no LBA {FAR_LBA:#x} in {said}")
        far = content_of(device, FAR_LBA - 32, 8)
        require(far == before[: 8 * 512], "a block beside it is not what was written")
        after = os.urandom(8 * 512)
        well(write(device, FAR_LBA - FAR_LBA % 8, after), "WRITE over the bad block")
        run("sg_sync", device)
        drop_caches()
        require(content_of(device, FAR_LBA - FAR_LBA % 8, 8) == after, "the block is not mended")
        require(daemon().alive(), "the daemon has died")


@check
def disk_that_fails_altogether_and_comes_back() -> None:
    """`dm-error` under an open LUN: every READ is a medium error; with the old table back the LUN serves
    again, with no restart."""
    with sound_lun(), lun_over("gone") as (mapped, _, _, device):
        kept = os.urandom(64 * 512)
        well(write(device, 0, kept), "WRITE to a sound disk")
        run("sg_sync", device)
        mapped.becomes(GONE)
        drop_caches()
        ran = read(device, FAR_LBA)
        require(ran.status == MEDIUM_ERROR, f"READ of a disk that fails: {ran}")
        mapped.becomes(SOUND)
        until("the LUN to serve again", lambda: read(device, FAR_LBA).status == 0)
        require(content_of(device, 0, 64) == kept, "what was durable is not there")
        well(write(device, FAR_LBA, kept), "WRITE after the disk is back")
        run("sg_sync", device)


@check
def lost_write_back_fails_the_flush() -> None:
    """`dm-flakey error_writes`: what was taken into the cache and cannot be written fails SYNCHRONIZE CACHE,
    the API says so, FUA fails at once; reads go on, and after the repair so do writes."""
    with sound_lun(), lun_over("flakey") as (mapped, disk, _, device):
        well(write(device, 0, os.urandom(64 * 512)), "WRITE to a sound disk")
        run("sg_sync", device)
        mapped.becomes(TAKES_NO_WRITES)
        well(write(device, 128, os.urandom(64 * 512)), "WRITE into the cache")
        said = attempt("sg_sync", device).refused()
        require("medium error" in said.lower() or "hardware error" in said.lower(), said)
        status = daemon().status(disk)
        require("write-back error" in status, f"the API says {status!r}")
        ran = write(device, 256, os.urandom(8 * 512), "fua")
        require(ran.status == MEDIUM_ERROR, f"WRITE with FUA: {ran}")
        # Once, a command hears by a deferred error that the FUA took the news of what was in the cache along:
        # ours, or one of udev's, which looks at a disk that was written to.
        until("READ while writes fail", lambda: read(device, 0).status == 0)
        mapped.becomes(SOUND)
        content = os.urandom(64 * 512)
        until("WRITE after the repair", lambda: write(device, 128, content).status == 0)
        until("SYNCHRONIZE CACHE after the repair", lambda: attempt("sg_sync", device).status == 0)
        drop_caches()
        require(content_of(device, 128, 64) == content, "not what was written after the repair")


# -- disks that are slow or hang ----------------------------------------------------------------


@check
def disk_that_hangs_holds_nobody_else() -> None:
    """A suspended map: its READ waits for as long as it hangs; another LUN, the API, a login, a logout and
    a LUN RESET of that LUN do not. When it answers again, so does the LUN."""
    with sound_lun() as load, lun_over("hangs") as (mapped, disk, _, device):
        well(read(device, 0), "READ before")
        drop_caches()
        mapped.hang()
        try:
            command = (
                "sg_dd",
                f"if={device}",
                "of=/dev/null",
                "iflag=sgio",
                "bs=512",
                f"skip={FAR_LBA}",
                "count=8",
            )
            with Background(*command) as held:
                load.goes_on(300)
                daemon().status(disk)
                with logged_in(disk.iqn, PORTAL, iscsi.BOB, **{"node.session.scan": "manual"}) as other:
                    require(other.sessions(), "no second session")
                require(held.running(), "the READ did not wait for its disk")
                run("sg_reset", "--device", "--no-escalate", device)
        finally:
            mapped.resume()
        until("the LUN to answer", lambda: read(device, FAR_LBA).status == 0)


@check
def slow_disk_slows_nobody_else() -> None:
    """`dm-delay` of half a second for each command: before it has done twenty, another LUN has done a
    hundred."""
    with sound_lun() as load, lun_over("slow", SLOW) as (_, _, _, device):
        drop_caches()
        command = ("dd", f"if={device}", "of=/dev/null", "iflag=direct", "bs=64k", "count=20")
        with Background(*command) as slow:
            load.goes_on(100)
            require(slow.running(), "20 commands of a slow disk were done first")
            slow.ended()


@check
def daemon_ends_well_with_a_disk_that_failed() -> None:
    """SIGTERM with writes in the cache and their disk gone: the daemon ends by itself, status 0, says what it
    could not flush and logs no bug; the next one serves the disk when that is back."""
    with lun_over("ends") as (mapped, _, _, device):
        well(write(device, 0, os.urandom(64 * 512)), "WRITE to a sound disk")
        mapped.becomes(GONE)
        ours = daemon()
        status = ours.terminate()
        mapped.becomes(SOUND)
        said = "\n".join(ours.lines[-60:])
        ours.start()
        require(status == 0, f"exit status {status}\n{said}")
        require("could not be flushed" in said, said)
        require(not ours.tracebacks(), said)
        until("the LUN to serve again", lambda: read(device, 0).status == 0)
