"""What the fault tests share: one session on a LUN of the real daemon, and waiting for what is to happen."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import Reply, SocketInitiator

__all__ = ["BLOCK", "Lun", "eventually", "lun_of", "pattern"]

BLOCK = 512

GOOD = 0
CHECK_CONDITION = 2

NOT_READY, MEDIUM_ERROR, ILLEGAL_REQUEST, UNIT_ATTENTION, DATA_PROTECT = 0x2, 0x3, 0x5, 0x6, 0x7
SPACE_ALLOCATION_FAILED = (0x27, 0x07)
UNRECOVERED_READ_ERROR = (0x11, 0x00)
WRITE_ERROR = (0x0C, 0x00)
MEDIUM_NOT_PRESENT = (0x3A, 0x00)
MEDIUM_MAY_HAVE_CHANGED = (0x28, 0x00)
CAPACITY_DATA_CHANGED = (0x2A, 0x09)

PATIENCE_S = 120.0


class Lun(SocketInitiator):
    """A session logged in to one disk; LBAs and lengths in blocks of 512 bytes."""

    def __init__(
        self,
        daemon: Daemon | tuple[str, int],
        iqn: str,
        lun: int = 0,
        *,
        name: str | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """``daemon``: it, or the address of its portal; ``patience_s``: for each answer."""
        portal = daemon if isinstance(daemon, tuple) else (HOST, daemon.portal_port)
        super().__init__(portal, timeout_s=patience_s)
        self.number = lun
        self.attentions: list[tuple[int, int]] = []
        """(ASC, ASCQ) of the unit attentions met by ``ready``."""
        self.login(iqn, **({"initiator_name": name} if name else {}))

    def ready(self) -> "Lun":
        """Take the unit attentions that are pending, into ``attentions``."""
        while True:
            reply = self.do(cdbs.test_unit_ready())
            if reply.sense_key != UNIT_ATTENTION:
                return self
            assert reply.additional_sense is not None
            self.attentions.append(reply.additional_sense)

    def do(self, cdb: bytes, data_out: bytes = b"", read: int = 0) -> Reply:
        return self.command(cdb, data_out, read, self.number)

    def read(self, lba: int, blocks: int = 1) -> Reply:
        return self.do(cdbs.read10(lba, blocks), read=blocks * BLOCK)

    def write(self, lba: int, data: bytes, *, fua: bool = False) -> Reply:
        return self.do(cdbs.write10(lba, len(data) // BLOCK, byte1=cdbs.FUA if fua else 0), data)

    def flush(self) -> Reply:
        return self.do(cdbs.synchronize_cache10(0, 0))

    def capacity(self) -> int:
        """Bytes."""
        data = self.do(cdbs.read_capacity16(), read=32).data
        return (int.from_bytes(data[:8], "big") + 1) * int.from_bytes(data[8:12], "big")


@contextmanager
def lun_of(daemon: Daemon, disk: Disk | str, lun: int = 0, *, name: str | None = None) -> Iterator[Lun]:
    """A session on a disk, its first unit attentions taken."""
    with Lun(daemon, disk if isinstance(disk, str) else disk.iqn, lun, name=name) as session:
        yield session.ready()


def pattern(number: int, blocks: int = 1) -> bytes:
    """Blocks that say which they are, each different from its neighbours and from zeros."""
    return b"".join((number + i + 1).to_bytes(8, "big") * (BLOCK // 8) for i in range(blocks))


def sense(reply: Reply) -> tuple[int | None, tuple[int, int] | None]:
    """Sense key, and ASC with ASCQ."""
    return reply.sense_key, reply.additional_sense


def eventually(true: Callable[[], object], what: str) -> None:
    """Ask until it is true; what the daemon notices by itself it notices within seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.05)


def status_of(daemon: Daemon, extent_id: int) -> str:
    """What the API says of an extent's medium."""
    shown = daemon.expect(200, "GET", f"services/iscsi/extent/{extent_id}/")
    status = shown["iscsi_target_extent_status"]
    assert isinstance(status, str)
    return status
