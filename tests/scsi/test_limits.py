"""I/O limits and pauses in the task set: what waits, what does not, and that nothing is lost."""

import pytest

from tests.scsi.support import Disk, HeldLane

WRITE = "2A 00 00000000 00 0001 00"
READ = "28 00 00000000 00 0001 00"
DATA = bytes(512)


class Turnstile:
    """A throttle that lets so many commands through."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken: list[int] = []

    @property
    def exhausted(self) -> bool:
        return not self.count

    def take(self, length: int) -> bool:
        if self.count:
            self.count -= 1
            self.taken.append(length)
            return True
        return False


def test_commands_that_move_data_wait_for_their_share_in_order() -> None:
    disk, gate = Disk(), Turnstile(2)
    disk.unit.limit(gate)
    sent = [disk.start(READ, expected_in=512) for _ in range(5)]
    assert [request in disk.delivered for request in sent] == [True, True, False, False, False]
    gate.count = 2
    disk.unit.proceed()
    assert [request in disk.delivered for request in sent] == [True, True, True, True, False]
    assert gate.taken == [512] * 4


def test_others_do_not_wait() -> None:
    disk = Disk()
    disk.unit.limit(Turnstile(0))
    held = disk.start(WRITE, DATA)
    for cdb in ("00" * 6, "12 00 00 00FF 00", "25" + "00" * 9, "A0 00 00 00 00 00 00000400 00 00"):
        assert not disk.run(cdb).status
    assert held not in disk.delivered


def test_the_fast_path_steps_aside() -> None:
    disk = Disk()
    assert disk.unit.read_at_once(0x28, 0, 1, 512, False) is not None
    disk.unit.limit(Turnstile(5))
    assert disk.unit.read_at_once(0x28, 0, 1, 512, False) is None
    assert not disk.unit.write_at_once(0x2A, 0, 1, DATA, disk.nexus)
    disk.unit.limit(None)
    assert disk.unit.read_at_once(0x28, 0, 1, 512, False) is not None


def test_lifted_limits_let_everything_go() -> None:
    disk = Disk()
    disk.unit.limit(Turnstile(0))
    sent = [disk.start(WRITE, DATA) for _ in range(3)]
    disk.unit.limit(None)
    assert all(not disk.delivered[request].status for request in sent)


def test_what_waits_can_be_aborted() -> None:
    disk, gate = Disk(), Turnstile(0)
    disk.unit.limit(gate)
    one, two = disk.start(WRITE, DATA), disk.start(WRITE, DATA)
    assert disk.unit.abort(one)
    gate.count = 2
    disk.unit.proceed()
    assert one not in disk.delivered
    assert two in disk.delivered
    assert gate.taken == [512]


@pytest.mark.parametrize("running", [WRITE, "93 00" + "00" * 10 + "0001 00 00"])
def test_a_pause_begins_when_no_write_is_under_way_and_holds_the_next(running: str) -> None:
    lane = HeldLane()
    disk = Disk(lane=lane)
    disk.unit.write_cache = False  # so that a write goes to the lane
    under_way = disk.start(running, DATA)
    begun: list[bool] = []
    pause = disk.unit.hold_still(lambda: begun.append(True))
    later = disk.start(WRITE, DATA)
    assert not begun
    lane.release(1)
    assert begun == [True]
    assert under_way in disk.delivered
    assert not lane.jobs
    disk.unit.go_on(pause)
    lane.release()
    assert later in disk.delivered


def test_a_pause_holds_for_units_beside() -> None:
    one, two = Disk(), Disk()
    two.unit.share_medium(one.unit)
    begun: list[bool] = []
    pause = one.unit.hold_still(lambda: begun.append(True))
    assert begun == [True]
    held = two.start(WRITE, DATA)
    assert held not in two.delivered
    assert two.unit.read_at_once(0x28, 0, 1, 512, False) is None
    one.unit.go_on(pause)
    assert held in two.delivered
    assert two.unit.read_at_once(0x28, 0, 1, 512, False) is not None


def test_a_pause_waits_for_an_aborted_write_that_may_still_land() -> None:
    lane = HeldLane()
    disk = Disk(lane=lane)
    disk.unit.write_cache = False
    stuck = disk.start(WRITE, DATA)
    disk.unit.abort(stuck)
    begun: list[bool] = []
    pause = disk.unit.hold_still(lambda: begun.append(True))
    assert not begun
    disk.unit.go_on(pause)  # given up
    later = disk.start("2A 00 00000010 00 0001 00", DATA, nexus=disk.nexus)
    lane.release()
    assert not begun
    assert later in disk.delivered
