"""Which data a medium may hold after a crash, and the writes that a crash comes in the middle of.

For each block a ``Ledger`` has the versions that the medium may hold. A write adds one as soon as it is
sent; a flush that was answered GOOD (and FUA, and WCE=0) takes away all older than what had been answered
before it.
"""

import random
from collections.abc import Callable

from tests import cdbs
from tests.faults.kit import BLOCK, Lun
from tests.initiator import ConnectionClosed

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
