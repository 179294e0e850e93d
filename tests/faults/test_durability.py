"""What was acknowledged as durable is durable: kill -9 in the middle of verified writes, and cut power.

The judge is a ``Ledger``. After the end the file is read directly: each block must be one of its versions,
whole. ``tests/guest`` does the same to a whole machine.
"""

import random
import threading
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.fusefs import faulty_fs
from tests.faults.kit import lun_of
from tests.faults.ledger import RUN, Ledger, write_until_cut

ROUNDS = 100


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
