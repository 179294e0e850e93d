"""What people do with a disk: file systems, verified load, discard, reservations, offloaded copies."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.guest.inside import host, iscsi
from tests.guest.inside.checks import check, require
from tests.guest.inside.flipping import FlippingRelay
from tests.guest.inside.iscsi import ALICE, BOB, FAST_RECOVERY, Node, digests, disk, logged_in, make_disk
from tests.guest.inside.shell import attempt, run, until
from tests.guest.wires import PORTALS

MIB = 1 << 20
FILES, FILE_BYTES = 60, MIB
"""What fills a file system: enough to pass the page cache's first write-back, small enough for the time."""
MISCOMPARE = 14
"""Exit status of sg3_utils for sense key MISCOMPARE."""
RESERVATION_CONFLICT = 24
"""Exit status of sg3_utils for that SCSI status."""
ALICE_KEY, BOB_KEY = "0xa11ce", "0xb0b"
WRITE_EXCLUSIVE, EXCLUSIVE_REGISTRANTS = "1", "6"
"""Reservation types: Write Exclusive; Exclusive Access, Registrants Only (SPC-4 §6.14.3.4)."""


TOKEN = slice(38, 550)
"""Where RECEIVE ROD TOKEN INFORMATION has the token when there is no sense data (SPC-4 §6.28)."""
READ_10_OF_ONE_BLOCK = ["28", "00", "00", "00", "00", "00", "00", "00", "01", "00"]


# -- file systems -------------------------------------------------------------------------------


@contextmanager
def mounted(device: str, *options: str) -> Iterator[Path]:
    where = Path("/mnt/disk")
    where.mkdir(exist_ok=True)
    run("mount", *options, device, where)
    try:
        yield where
    finally:
        run("umount", where)


def fill(where: Path) -> dict[str, str]:
    """Files of random bytes in directories; the SHA-256 of each by its name."""
    sums = {}
    for number in range(FILES):
        path = where / f"directory{number % 7}" / f"file{number}"
        path.parent.mkdir(exist_ok=True)
        content = os.urandom(FILE_BYTES)
        path.write_bytes(content)
        sums[str(path.relative_to(where))] = hashlib.sha256(content).hexdigest()
    return sums


def compare(where: Path, sums: dict[str, str]) -> None:
    for name, wanted in sums.items():
        found = hashlib.sha256((where / name).read_bytes()).hexdigest()
        require(found == wanted, f"{name} is not what was written")


def file_system(size: str, make: list[str], verify: list[str]) -> None:
    """Made, filled, checked; then again after logout, login and a restart of the daemon."""
    iqn = make_disk(size)["iqn"]
    with logged_in(iqn) as node:
        run(*make, node.disk())
        with mounted(node.disk()) as where:
            sums = fill(where)
            run("sync", "-f", where)
        run(*verify, node.disk())
    with logged_in(iqn, PORTALS[1]) as node:
        run(*verify, node.disk())
        with mounted(node.disk()) as where:
            compare(where, sums)
            shutil.rmtree(where / "directory0")
    host.ask("restart")
    with logged_in(iqn) as node:
        run(*verify, node.disk())
        with mounted(node.disk(), "-o", "ro") as where:
            compare(where, {name: sums[name] for name in sums if not name.startswith("directory0/")})


@check
def ext4_keeps_what_was_written() -> None:
    """ext4 made, filled and `e2fsck`ed; all sums right after logout and login, and after a daemon restart."""
    file_system("256MB", ["mkfs.ext4", "-q"], ["e2fsck", "-f", "-n"])


@check
def xfs_keeps_what_was_written() -> None:
    """The same with XFS and `xfs_repair -n`."""
    file_system("320MB", ["mkfs.xfs", "-q"], ["xfs_repair", "-n"])


# -- verified load ------------------------------------------------------------------------------


def verified_load(header: bool, data: bool) -> None:
    settings = digests(header, data)
    with disk("64MB", **settings) as (node, device):
        for name, wanted in {"header_digest": header, "data_digest": data}.items():
            number = node.session().name.removeprefix("session")
            seen = Path(f"/sys/class/iscsi_connection/connection{number}:0/{name}").read_text().strip()
            require(bool(int(seen)) == wanted, f"{name} {seen}")
        load = ("--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1")
        run(
            "fio",
            "--name=random",
            f"--filename={device}",
            "--rw=randwrite",
            "--bsrange=4k-256k",
            "--size=48M",
            *load,
        )
        run("fio", "--name=serial", f"--filename={device}", "--rw=write", "--bs=1M", "--size=32M", *load)


@check
def fio_verifies_without_digests() -> None:
    """`fio --verify` with blocks of 4 KiB to 1 MiB; digests off."""
    verified_load(False, False)


@check
def fio_verifies_with_header_digest() -> None:
    """The same with HeaderDigest=CRC32C."""
    verified_load(True, False)


@check
def fio_verifies_with_data_digest() -> None:
    """The same with DataDigest=CRC32C."""
    verified_load(False, True)


@check
def fio_verifies_with_both_digests() -> None:
    """The same with both digests."""
    verified_load(True, True)


@check
def fio_verifies_over_a_wire_that_flips_bits() -> str:
    """Both digests, and one PDU in 300 damaged each way, header or data: whatever error recovery level the
    target offers, fio ends without an error."""
    flipped: list[str] = []
    for level in (0, 1, 2):
        with FlippingRelay(PORTALS[0], 300, seed=level) as relay:
            iqn = make_disk("64MB", target={"iscsi_target_error_recovery_level": level})["iqn"]
            settings = {**digests(True, True), **FAST_RECOVERY, "node.session.timeo.replacement_timeout": 120}
            with logged_in(iqn, relay.portal, **settings) as node:
                run(
                    "fio",
                    "--name=flips",
                    f"--filename={node.disk()}",
                    "--rw=randrw",
                    "--bsrange=4k-256k",
                    "--size=48M",
                    *("--direct=1", "--ioengine=libaio", "--iodepth=16"),
                    *("--verify=crc32c", "--verify_fatal=1"),
                    limit_s=350,
                )
            require(all(relay.flipped.values()), f"level {level}: {relay.flipped}")
            flipped.append(f"level {level}: {relay.flipped}")
    return "; ".join(flipped)


# -- thin provisioning --------------------------------------------------------------------------


@check
def blkdiscard_gives_space_back() -> str:
    """`blkdiscard` (UNMAP) shrinks the backing file and reads back as zeros; `-z` writes zeros."""
    made = make_disk("64MB")
    path = made["luns"][0]["path"]
    with logged_in(made["iqn"]) as node:
        device = node.disk()
        run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=32", "oflag=direct")
        full = host.ask("allocated", path=path)
        require(full >= 32 * MIB, f"{full} bytes taken by 32 MiB")
        run("blkdiscard", "--offset", 8 * MIB, "--length", 16 * MIB, device)
        half = host.ask("allocated", path=path)
        require(half <= full - 16 * MIB, f"{full} bytes before, {half} after 16 MiB discarded")
        run("cmp", f"--bytes={16 * MIB}", f"--ignore-initial={8 * MIB}:0", device, "/dev/zero")
        run("blkdiscard", "--zeroout", "--offset", 0, "--length", 8 * MIB, device)
        run("cmp", f"--bytes={8 * MIB}", device, "/dev/zero")
        run("blkdiscard", device)
        rest = host.ask("allocated", path=path)
        require(rest < MIB, f"{rest} bytes taken after all was discarded")
    return f"{full >> 20} MiB, then {half >> 20}, then {rest >> 10} KiB"


@check
def fstrim_gives_space_back() -> str:
    """Files removed from ext4, `fstrim`, and the backing file shrinks by as much."""
    made = make_disk("256MB")
    path = made["luns"][0]["path"]
    with logged_in(made["iqn"]) as node:
        run("mkfs.ext4", "-q", node.disk())
        with mounted(node.disk()) as where:
            fill(where)
            run("sync", "-f", where)
            full = host.ask("allocated", path=path)
            for directory in where.glob("directory*"):
                shutil.rmtree(directory)
            run("sync", "-f", where)
            run("fstrim", "--verbose", where)
            rest = host.ask("allocated", path=path)
            require(rest <= full - FILES * FILE_BYTES * 3 // 4, f"{full} bytes before, {rest} after")
        run("e2fsck", "-f", "-n", node.disk())
    return f"{full >> 20} MiB before, {rest >> 20} after"


@check
def mounting_with_discard_gives_space_back() -> None:
    """`mount -o discard`: what is deleted is unmapped at once."""
    made = make_disk("128MB")
    path = made["luns"][0]["path"]
    with logged_in(made["iqn"]) as node:
        run("mkfs.ext4", "-q", node.disk())
        with mounted(node.disk(), "-o", "discard") as where:
            (where / "large").write_bytes(os.urandom(32 * MIB))
            run("sync", "-f", where)
            full = host.ask("allocated", path=path)
            (where / "large").unlink()
            run("sync", "-f", where)
            until("less space", lambda: host.ask("allocated", path=path) <= full - 24 * MIB)


@check
def sg_write_same_and_sg_unmap() -> None:
    """WRITE SAME (10), (16) with and without UNMAP, and UNMAP, as sg3_utils send them."""
    with disk("16MB") as (_, device):
        run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=2", "oflag=direct")
        run("sg_write_same", "--10", "--in=/dev/zero", "--xferlen=512", "--lba=0", "--num=128", device)
        run("sg_write_same", "--16", "--in=/dev/zero", "--xferlen=512", "--lba=128", "--num=128", device)
        run(
            "sg_write_same",
            "--unmap",
            "--16",
            "--in=/dev/zero",
            "--xferlen=512",
            "--lba=256",
            "--num=128",
            device,
        )
        run("sg_unmap", "--force", "--lba=384", "--num=128", device)
        run("blockdev", "--flushbufs", device)
        run("cmp", f"--bytes={512 * 512}", device, "/dev/zero")
        said = run("sg_get_lba_status", "--lba=256", device)
        require("deallocated" in said.lower() or "unmapped" in said.lower(), said)


# -- reservations -------------------------------------------------------------------------------


@contextmanager
def two_initiators() -> Iterator[tuple[str, str, Node, Node]]:
    """One disk, seen by Alice and by Bob."""
    iqn = make_disk("16MB")["iqn"]
    with ExitStack() as stack:
        alice = stack.enter_context(logged_in(iqn, initiator=ALICE))
        bob = stack.enter_context(logged_in(iqn, initiator=BOB))
        for node in (alice, bob):
            attempt("sg_turs", node.disk())
        yield alice.disk(), bob.disk(), alice, bob


def register(device: str, key: str) -> None:
    run("sg_persist", "--out", "--register-ignore", f"--param-sark={key}", device)


def keys_of(device: str) -> list[str]:
    return re.findall(r"^ +(0x[0-9a-f]+)$", run("sg_persist", "--in", "--read-keys", device), re.MULTILINE)


def conflicts(device: str, *, write: bool) -> bool:
    """Whether a command of this device meets a reservation; the unit attention before it is taken."""
    attempt("sg_turs", device)
    if write:
        ran = attempt(
            "sg_write_same", "--16", "--in=/dev/zero", "--xferlen=512", "--lba=0", "--num=1", device
        )
    else:
        ran = attempt("sg_raw", "--request=512", device, *READ_10_OF_ONE_BLOCK)
    if ran.status == 0:
        return False
    require(
        ran.status == RESERVATION_CONFLICT or "reservation conflict" in ran.output.lower(),
        f"neither success nor conflict: {ran}",
    )
    return True


@check
def sg_persist_keeps_the_other_initiator_out() -> None:
    """Two initiator names register; Write Exclusive and Exclusive Access, Registrants Only shut out
    whom they should."""
    with two_initiators() as (alice, bob, _, _):
        register(alice, ALICE_KEY)
        run(
            "sg_persist",
            "--out",
            "--reserve",
            f"--param-rk={ALICE_KEY}",
            f"--prout-type={WRITE_EXCLUSIVE}",
            alice,
        )
        require(conflicts(bob, write=True), "Bob writes under Alice's reservation")
        require(not conflicts(bob, write=False), "Bob cannot read under Write Exclusive")
        require(not conflicts(alice, write=True), "Alice cannot write under her own reservation")
        said = run("sg_persist", "--in", "--read-reservation", bob)
        require(ALICE_KEY in said and "Write Exclusive" in said, said)
        run(
            "sg_persist",
            "--out",
            "--release",
            f"--param-rk={ALICE_KEY}",
            f"--prout-type={WRITE_EXCLUSIVE}",
            alice,
        )
        kind = f"--prout-type={EXCLUSIVE_REGISTRANTS}"
        run("sg_persist", "--out", "--reserve", f"--param-rk={ALICE_KEY}", kind, alice)
        require(conflicts(bob, write=False), "Bob reads under Exclusive Access")
        register(bob, BOB_KEY)
        require(not conflicts(bob, write=True), "a registrant cannot write")
        require(sorted(keys_of(bob)) == sorted([ALICE_KEY, BOB_KEY]), f"keys {keys_of(bob)}")


@check
def sg_persist_preempts_and_clears() -> None:
    """PREEMPT takes reservation and registration from the holder; CLEAR takes everything."""
    with two_initiators() as (alice, bob, _, _):
        register(alice, ALICE_KEY)
        register(bob, BOB_KEY)
        kind = f"--prout-type={WRITE_EXCLUSIVE}"
        run("sg_persist", "--out", "--reserve", f"--param-rk={ALICE_KEY}", kind, alice)
        run(
            "sg_persist",
            "--out",
            "--preempt-abort",
            f"--param-rk={BOB_KEY}",
            f"--param-sark={ALICE_KEY}",
            kind,
            bob,
        )
        require(keys_of(bob) == [BOB_KEY], f"keys {keys_of(bob)}")
        require(conflicts(alice, write=True), "Alice writes after she was preempted")
        run("sg_persist", "--out", "--clear", f"--param-rk={BOB_KEY}", bob)
        require(not conflicts(alice, write=True), "a cleared reservation conflicts")
        require(keys_of(bob) == [], f"keys {keys_of(bob)}")


@check
def sg_persist_reads_full_status() -> None:
    """READ FULL STATUS names both initiator ports; REPORT CAPABILITIES can be decoded."""
    with two_initiators() as (alice, bob, _, _):
        register(alice, ALICE_KEY)
        register(bob, BOB_KEY)
        said = run("sg_persist", "--in", "--read-full-status", alice)
        require(ALICE in said and BOB in said, said)
        run("sg_persist", "--in", "--report-capabilities", alice)


@check
def reservation_outlives_a_restart() -> None:
    """A registration with APTPL is there after the daemon was killed; one without is not."""
    made = make_disk("16MB", luns=2)
    first = made["luns"][0]["lun"]
    with logged_in(made["iqn"]) as node:
        kept, lost = node.disk(first), node.disk(first + 1)
        for device in (kept, lost):
            attempt("sg_turs", device)
        run("sg_persist", "--out", "--register", f"--param-sark={ALICE_KEY}", "--param-aptpl", kept)
        run("sg_persist", "--out", "--register", f"--param-sark={ALICE_KEY}", lost)
        run(
            "sg_persist",
            "--out",
            "--reserve",
            f"--param-rk={ALICE_KEY}",
            f"--prout-type={WRITE_EXCLUSIVE}",
            kept,
        )
    host.ask("kill9_and_start")
    with logged_in(made["iqn"]) as node:
        kept, lost = node.disk(first), node.disk(first + 1)
        for device in (kept, lost):
            attempt("sg_turs", device)
        require(keys_of(kept) == [ALICE_KEY], f"keys {keys_of(kept)}")
        require(ALICE_KEY in run("sg_persist", "--in", "--read-reservation", kept), "no reservation")
        require(keys_of(lost) == [], f"keys {keys_of(lost)}")


# -- atomic and offloaded commands --------------------------------------------------------------


@check
def sg_compare_and_write_writes_only_on_a_match() -> None:
    """COMPARE AND WRITE: a match writes, a mismatch is MISCOMPARE and changes nothing."""
    scratch = Path("/tmp/compare")
    old, new, other = os.urandom(512), os.urandom(512), os.urandom(512)
    with disk("16MB") as (_, device):
        Path(device).open("r+b").close()
        scratch.write_bytes(old)
        run("dd", f"if={scratch}", f"of={device}", "bs=512", "seek=8", "oflag=direct")
        command = ("sg_compare_and_write", f"--in={scratch}", "--lba=8", "--num=1", "--xferlen=1024", device)
        scratch.write_bytes(old + new)
        run(*command)
        scratch.write_bytes(old + other)
        ran = attempt(*command)
        require(ran.status == MISCOMPARE, f"{ran}")
        run("blockdev", "--flushbufs", device)
        out = Path("/tmp/read-back")
        run("dd", f"if={device}", f"of={out}", "bs=512", "skip=8", "count=1", "iflag=direct")
        require(out.read_bytes() == new, "the block is neither old nor what the match wrote")


@contextmanager
def copy_pair() -> Iterator[tuple[str, str]]:
    """Two LUNs of one target, the first filled."""
    made = make_disk("16MB", luns=2)
    with logged_in(made["iqn"]) as node:
        devices = [node.disk(lun["lun"]) for lun in made["luns"]]
        for device in devices:
            attempt("sg_turs", device)
        run("dd", "if=/dev/urandom", f"of={devices[0]}", "bs=1M", "count=8", "oflag=direct")
        yield devices[0], devices[1]
        for device in devices:
            run("blockdev", "--flushbufs", device)
        run("cmp", f"--bytes={8 * MIB}", *devices)


@check
def sg_xcopy_copies_between_luns() -> None:
    """EXTENDED COPY (LID1) between two LUNs by `sg_xcopy`; RECEIVE COPY RESULTS."""
    with copy_pair() as (source, sink):
        run("sg_copy_results", "--params", source)
        run("sg_xcopy", f"if={source}", f"of={sink}", "bs=512", f"count={8 * MIB // 512}")


@check
def ddpt_copies_by_xcopy() -> None:
    """The same by `ddpt oflag=xcopy`."""
    with copy_pair() as (source, sink):
        run(
            "ddpt",
            f"if={source}",
            "iflag=xcopy",
            f"of={sink}",
            "oflag=xcopy",
            "bs=512",
            f"count={8 * MIB // 512}",
        )


@check
def odx_copies_by_token() -> None:
    """ODX: POPULATE TOKEN, RECEIVE ROD TOKEN INFORMATION and WRITE USING TOKEN by `sg_raw`.

    Not by ``ddpt --odx``: ddpt 0.97 of Debian sends ranges of blocks that its own arguments do not name.
    """
    blocks = 8 * MIB // 512
    ranges = bytes(8) + blocks.to_bytes(4, "big") + bytes(4)
    parameters, answer = Path("/tmp/parameters"), Path("/tmp/answer")

    def send(service_action: int, content: bytes, device: str) -> None:
        parameters.write_bytes((len(content) - 2).to_bytes(2, "big") + content[2:])
        cdb = (
            bytes([0x83, service_action, 0, 0, 0, 0, 0, 0, 0, 1]) + len(content).to_bytes(4, "big") + bytes(2)
        )
        words = [f"{byte:02x}" for byte in cdb]
        run("sg_raw", f"--send={len(content)}", f"--infile={parameters}", device, *words)

    with copy_pair() as (source, sink):
        send(0x10, bytes(14) + len(ranges).to_bytes(2, "big") + ranges, source)
        cdb = ["84", "07", "00", "00", "00", "01", "00", "00", "00", "00", "00", "00", "04", "00", "00", "00"]
        run("sg_raw", "--request=1024", "--binary", f"--outfile={answer}", source, *cdb)
        received = answer.read_bytes()
        require(len(received) >= TOKEN.stop, f"{len(received)} bytes of ROD token information")
        send(0x11, bytes(16) + received[TOKEN] + bytes(6) + len(ranges).to_bytes(2, "big") + ranges, sink)


@check
def disks_of_every_block_size() -> None:
    """Logical blocks of 512, 1024, 2048 and 4096 bytes: the kernel takes them, ext4 goes on where it can."""
    for size in (512, 1024, 2048, 4096):
        made = make_disk("64MB", extent={"iscsi_target_extent_blocksize": size})
        with logged_in(made["iqn"]) as node:
            device = node.disk()
            require(int(run("blockdev", "--getss", device)) == size, f"not {size}")
            require(iscsi.capacity(device) == 64 * MIB, "capacity")
            run("mkfs.ext4", "-q", "-b", "4096", device)
            with mounted(device) as where:
                (where / "file").write_bytes(os.urandom(MIB))


@check
def read_only_extent_refuses_writes() -> None:
    """The kernel sees WP; a write fails, a read does not."""
    made = make_disk("16MB")
    extent = f"services/iscsi/extent/{made['luns'][0]['extent_id']}/"
    host.ask("api", method="PUT", path=extent, body={"iscsi_target_extent_ro": True})
    with logged_in(made["iqn"]) as node:
        device = node.disk()
        require(run("blockdev", "--getro", device).strip() == "1", "not read-only")
        run("dd", f"if={device}", "of=/dev/null", "bs=1M", "count=1", "iflag=direct")
        # Past the block device, which the kernel itself does not open for writing any more.
        command = ("sg_write_same", "--16", "--in=/dev/zero", "--xferlen=512", "--num=1", node.generic())
        attempt(*command).refused("protect")
