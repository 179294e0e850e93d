"""Long commands look for an abort between pieces: a task that nobody waits for gives its worker back."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.limits import COPY_CHUNK_BYTES, MAX_LINGERING_TASKS, SPACE_CHUNK_BYTES
from protocol.scsi.request import Request
from storage.memory import Null
from storage.wrap import Wrapper
from tests.scsi.support import BLOCK, Disk, HeldLane
from tests.scsi.test_block import cdb16, unmap

PIECES = 4
SIZE = PIECES * SPACE_CHUNK_BYTES
COPY_BLOCKS = PIECES * COPY_CHUNK_BYTES // BLOCK
PATTERN = b"\xa5" * BLOCK


class Watched(Wrapper):
    """Calls ``first`` within the first operation that touches the medium, and counts them all."""

    def __init__(self) -> None:
        super().__init__(Null(SIZE))
        self.operations: list[str] = []
        self.first: Callable[[], None] = lambda: None

    def _follow(self) -> None:
        """Without a map: all of it is to be read."""
        super()._follow()
        self.capabilities = replace(self.capabilities, map_query=False)

    def _concerned(self, operation: str, offset: int, length: int) -> bool:
        return True

    def _before(self, operation: str, offset: int, length: int) -> None:
        self.operations.append(operation)
        if len(self.operations) == 1:
            self.first()


ZEROS = bytes(PIECES * COPY_CHUNK_BYTES)


@pytest.mark.parametrize(
    ("cdb", "data", "done"),
    [
        pytest.param(cdb16(0x8F, 0, COPY_BLOCKS), b"", ["read"], id="VERIFY"),
        pytest.param(cdb16(0x8F, 0, COPY_BLOCKS, 0x02), ZEROS, ["read"], id="VERIFY, BYTCHK 1"),
        pytest.param(cdb16(0x8F, 0, COPY_BLOCKS, 0x06), bytes(BLOCK), ["read"], id="VERIFY, BYTCHK 3"),
        pytest.param(cdb16(0x8B, 0, COPY_BLOCKS), ZEROS, ["read", "write"], id="ORWRITE"),
        pytest.param(cdb16(0x93, 0, COPY_BLOCKS), PATTERN, ["write"], id="WRITE SAME"),
        pytest.param(
            *unmap(*((n * (SPACE_CHUNK_BYTES // BLOCK), 1) for n in range(PIECES))), ["unmap"], id="UNMAP"
        ),
    ],
)
def test_a_long_command_ends_at_the_piece_in_which_it_is_aborted(
    cdb: bytes, data: bytes, done: list[str]
) -> None:
    backend, lane = Watched(), HeldLane()
    disk = Disk(backend=backend, lane=lane)
    request = disk.start(cdb, data)
    assert lane.jobs and not backend.operations
    backend.first = lambda: disk.unit.abort(request) or None
    lane.release()
    assert backend.operations == done
    assert request not in disk.delivered
    assert not disk.unit.has_in_hand(request)
    backend.operations.append("the abort has been")
    assert disk.start(cdb, data) in disk.unit.tasks  # nothing is barred by what has ended
    lane.release()
    assert len(backend.operations) > len(done) + PIECES


def test_a_stuck_medium_does_not_gather_aborted_tasks_for_ever() -> None:
    """TASK SET FULL (SAM-5 §5.3.1) for what may wait for the medium, until it gives some back."""
    backend, lane = Watched(), HeldLane()
    disk = Disk(backend=backend, lane=lane)

    def write(lba: int) -> Request:
        return disk.start(cdb16(0x8A, lba, 1, 0x08), bytes(BLOCK))  # FUA: never at once

    for lba in range(MAX_LINGERING_TASKS):
        assert disk.unit.abort(write(lba))
    assert disk.delivered[write(MAX_LINGERING_TASKS)].status == ScsiStatus.TASK_SET_FULL
    assert disk.run("12 00 00 00 24 00").status == ScsiStatus.GOOD
    lane.release(1)
    waiting = write(0)
    lane.release()
    assert disk.delivered[waiting].status == ScsiStatus.GOOD
