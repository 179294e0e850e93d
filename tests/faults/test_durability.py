"""What was acknowledged as durable is durable: kill -9 in the middle of verified writes, and cut power.

The judge is a ``Ledger``: for each block the versions that the medium may hold. A write adds one as soon as
it is sent, a flush that was answered GOOD (and FUA, and WCE=0) takes away all older than what had been
answered before it. After the end the file is read directly: each block must be one of its versions, whole.
"""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.fusefs import faulty_fs
from tests.faults.kit import BLOCK, Lun, lun_of
from tests.initiator import ConnectionClosed

ROUNDS = 100
BLOCKS = 2048
"""Of the extent: small, so that blocks are written over and over."""
RUN = 8
"""Blocks of one write: a page."""


def content(lba: int, version: int) -> bytes:
    return (lba.to_bytes(8, "big") + version.to_bytes(8, "big")) * (BLOCK // 16)


class Ledger:
    """The versions that each block may have now; 0 is a block of zeros, never written."""

    def __init__(self) -> None:
        self.allowed: list[list[int]] = [[0] for _ in range(BLOCKS)]
        """Oldest first."""
        self.version = 0

    def sent(self, lba: int) -> tuple[int, bytes]:
        """The data of a new write to a run of blocks, which may arrive from now on; its version."""
        self.version += 1
        for block in range(lba, lba + RUN):
            self.allowed[block].append(self.version)
        return self.version, b"".join(content(lba + i, self.version) for i in range(RUN))

    def durable(self, lba: int, version: int) -> None:
        """Nothing older than this can be there any more."""
        for block in range(lba, lba + RUN):
            allowed = self.allowed[block]
            self.allowed[block] = [each for each in allowed if each >= version]

    def judge(self, data: bytes) -> None:
        """Hold what the medium has against it; from now on that is what it has."""
        assert len(data) == BLOCKS * BLOCK
        for lba in range(BLOCKS):
            found = data[lba * BLOCK : (lba + 1) * BLOCK]
            for version in self.allowed[lba]:
                if found == (content(lba, version) if version else bytes(BLOCK)):
                    self.allowed[lba] = [version]
                    break
            else:
                had = int.from_bytes(found[8:16], "big")
                raise AssertionError(f"block {lba}: {had} of {self.allowed[lba]}, {found[:24].hex()}…")


def write_until_cut(lun: Lun, ledger: Ledger, chance: random.Random, cut: Callable[[], None]) -> None:
    """Verified writes with periodic flushes and some FUA; ``cut`` ends it while more are under way."""
    answered: dict[int, int] = {}
    try:
        for batch in range(chance.randint(2, 8)):
            tasks = []
            # no two of one batch to the same blocks: their order would be nobody's promise
            for lba in chance.sample(range(0, BLOCKS, RUN), 16):
                version, data = ledger.sent(lba)
                fua = chance.random() < 0.1
                cdb = cdbs.write10(lba, RUN, byte1=cdbs.FUA if fua else 0)
                tasks.append((lba, version, fua, lun.send_command(cdb, data)))
            for lba, version, fua, task in tasks:
                assert lun.wait(task).good
                answered[lba] = version
                if fua:
                    ledger.durable(lba, version)
            if batch % 2:
                covered = dict(answered)
                flushes = [lun.send_command(cdbs.synchronize_cache10(0, 0)) for _ in range(3)]
                assert all(lun.wait(flush).good for flush in flushes)
                for lba, version in covered.items():
                    ledger.durable(lba, version)
        for lba in chance.sample(range(0, BLOCKS, RUN), 24):
            _, data = ledger.sent(lba)
            lun.send_command(cdbs.write10(lba, RUN), data)
        cut()
        lun.wait_all()
    except (ConnectionClosed, ConnectionError):
        pass


def rounds(directory: Path, seed: int, count: int, failures: list[BaseException]) -> None:
    """Kill and start one daemon again and again over one extent."""
    chance = random.Random(seed)
    daemon = Daemon(directory).start()
    try:
        disk = daemon.create_disk("killed", "1MB")
        ledger = Ledger()
        for number in range(count):
            with lun_of(daemon, disk) as lun:
                write_until_cut(lun, ledger, chance, daemon.kill9)
            ledger.judge(disk.path.read_bytes())
            if number < count - 1:
                daemon.start()
        assert not daemon.tracebacks()
    except BaseException as error:
        failures.append(error)
    finally:
        daemon.kill9()


@pytest.mark.timeout(600)
def test_kill_9_during_verified_writes(tmp_path: Path) -> None:
    """100 rounds, by two daemons at once."""
    failures: list[BaseException] = []
    workers = [
        threading.Thread(target=rounds, args=(tmp_path / str(seed), seed, ROUNDS // 2, failures))
        for seed in range(2)
    ]
    for seed, worker in enumerate(workers):
        (tmp_path / str(seed)).mkdir()
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


@pytest.mark.parametrize("seed", range(6))
def test_power_cut_during_verified_writes(tmp_path: Path, seed: int) -> None:
    """On a disk with a cache that forgets: a flush or FUA that was answered has reached the medium."""
    chance = random.Random(seed)
    with faulty_fs(tmp_path, volatile=True) as fs:
        daemon = Daemon(tmp_path / "d", options=("--extent-root", str(fs.at))).start()
        try:
            disk = daemon.create_disk(
                "cut", "1MB", extent={"iscsi_target_extent_path": str(fs.at / "cut.img")}
            )
            ledger = Ledger()

            def cut() -> None:
                fs.cut_power(seed)
                daemon.kill9()

            with lun_of(daemon, disk) as lun:
                write_until_cut(lun, ledger, chance, cut)
            ledger.judge((fs.backing / "cut.img").read_bytes())
        finally:
            daemon.kill9()


def test_without_a_write_cache_every_answered_write_survives_power_loss(tmp_path: Path) -> None:
    """MODE SELECT with WCE=0 (SBC-3 §6.4.5): each write is durable when it is answered."""
    with faulty_fs(tmp_path, volatile=True) as fs:
        daemon = Daemon(tmp_path / "d", options=("--extent-root", str(fs.at))).start()
        try:
            disk: Disk = daemon.create_disk(
                "wt", "1MB", extent={"iscsi_target_extent_path": str(fs.at / "wt.img")}
            )
            ledger = Ledger()
            with lun_of(daemon, disk) as lun:
                page = bytearray(lun.do(cdbs.mode_sense10(0x08), read=255).data)
                start = 8 + int.from_bytes(page[6:8], "big")
                parameters = bytearray(page[: start + 20])
                parameters[0:2] = b"\0\0"
                parameters[3] = 0  # DEVICE-SPECIFIC PARAMETER is reserved in MODE SELECT
                parameters[start] &= 0x3F
                parameters[start + 2] &= ~0x04 & 0xFF
                assert lun.do(cdbs.mode_select10(len(parameters)), bytes(parameters)).good
                for lba in range(0, 512, RUN):
                    version, data = ledger.sent(lba)
                    assert lun.do(cdbs.write10(lba, RUN), data).good
                    ledger.durable(lba, version)
                fs.cut_power(1)
                daemon.kill9()
            ledger.judge((fs.backing / "wt.img").read_bytes())
        finally:
            daemon.kill9()
