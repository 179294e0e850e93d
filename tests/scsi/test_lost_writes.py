"""Deferred errors (SPC-4 §4.5.7): a write-back error is told once to every nexus whose data it may be."""

import errno

import pytest

from storage.memory import Memory
from storage.wrap import Faulty
from tests.scsi.support import BLOCK, BLOCKS, Disk, HeldLane, make_nexus, sense_of

WRITE = "2A 00 00000000 00 0001 00"
WRITE_FUA = "2A 08 00000000 00 0001 00"
READ = "28 00 00000000 00 0001 00"
FLUSH = "35 00 00000000 00 0000 00"
FLUSH_PART = "35 00 00000000 00 0001 00"
FLUSH_SOON = "35 02 00000000 00 0000 00"
REQUEST_SENSE = "03 00 0000 FC 00"
INQUIRY = "12 00 00 00FF 00"
TEST_UNIT_READY = "00" * 6
DATA = bytes(range(256)) * 2
WRITE_ERROR = (0x03, 0x0C, 0x00)
CURRENT, DEFERRED = 0x70, 0x71


@pytest.fixture
def backend() -> Faulty:
    return Faulty(Memory(BLOCKS * BLOCK))


@pytest.fixture
def disk(backend: Faulty) -> Disk:
    return Disk(backend=backend)


def write(disk: Disk, nexus: object = None) -> None:
    assert not disk.run(WRITE, DATA, nexus=nexus).status


def lose(disk: Disk, backend: Faulty, *, by: object) -> None:
    backend.fail(errno.EIO, "flush", times=1)
    outcome = disk.run(FLUSH, nexus=by)
    assert sense_of(outcome) == WRITE_ERROR
    assert outcome.sense[0] & 0x7F == CURRENT


def lose_unseen(disk: Disk, backend: Faulty) -> None:
    """Another has met the loss: a flush of the daemon itself."""
    backend.lost_writes += 1
    disk.unit.note_lost_writes()


def test_all_who_wrote_are_told_once_and_others_never(disk: Disk, backend: Faulty) -> None:
    writer, reader, careful = make_nexus(2), make_nexus(3), make_nexus(4)
    for nexus in (writer, reader, careful):
        disk.login(nexus)
    write(disk, careful)
    assert not disk.run(FLUSH, nexus=careful).status
    write(disk, writer)
    write(disk)
    lose(disk, backend, by=disk.nexus)
    told = disk.run(READ, nexus=writer)
    assert sense_of(told) == WRITE_ERROR
    assert told.sense[0] & 0x7F == DEFERRED
    for nexus in (writer, reader, careful, disk.nexus):
        assert not disk.run(READ, nexus=nexus).status


@pytest.mark.parametrize("flush", [FLUSH_PART, FLUSH_SOON])
def test_a_flush_of_a_part_or_one_not_waited_for_covers_nothing(
    disk: Disk, backend: Faulty, flush: str
) -> None:
    other = make_nexus(2)
    disk.login(other)
    write(disk, other)
    assert not disk.run(flush, nexus=other).status
    lose(disk, backend, by=disk.nexus)
    assert sense_of(disk.run(READ, nexus=other)) == WRITE_ERROR


def test_what_was_written_during_a_flush_is_not_covered(backend: Faulty) -> None:
    lane = HeldLane()
    disk = Disk(backend=backend, lane=lane)
    flush = disk.start(FLUSH)
    assert not disk.delivered[disk.start(WRITE, DATA)].status
    lane.release()
    assert not disk.delivered[flush].status
    lose_unseen(disk, backend)
    assert sense_of(disk.run(TEST_UNIT_READY)) == WRITE_ERROR


def test_a_write_that_a_flush_passed_by_is_not_covered(backend: Faulty) -> None:
    lane = HeldLane()
    disk = Disk(backend=backend, lane=lane)
    slow = disk.start(WRITE_FUA, DATA)
    flush = disk.start(FLUSH)
    writing, flushing = lane.jobs
    lane.jobs = [flushing]
    lane.release()
    assert not disk.delivered[flush].status
    lose_unseen(disk, backend)
    lane.jobs = [writing]
    lane.release()
    assert not disk.delivered[slow].status
    assert sense_of(disk.run(TEST_UNIT_READY)) == WRITE_ERROR


def test_a_failed_flush_leaves_its_nexus_owed_the_next_loss(disk: Disk, backend: Faulty) -> None:
    write(disk)
    lose(disk, backend, by=disk.nexus)
    lose_unseen(disk, backend)
    assert sense_of(disk.run(TEST_UNIT_READY)) == WRITE_ERROR


def test_a_write_to_another_lun_is_none_of_this_one(disk: Disk, backend: Faulty) -> None:
    """One session, two LUNs: what one medium lost is told to those that wrote to it."""
    other = Disk(backend=Faulty(Memory(BLOCKS * BLOCK)))
    neighbour = make_nexus(2)
    for either in (disk, other):
        either.login(neighbour)
    write(other, neighbour)
    assert other.unit.write_at_once(0x2A, 0, 1, DATA, neighbour)
    write(disk)
    lose(disk, backend, by=disk.nexus)
    for either in (disk, other):
        assert not either.run(READ, nexus=neighbour).status


def test_a_write_that_was_done_at_once_counts(disk: Disk, backend: Faulty) -> None:
    assert disk.unit.write_at_once(0x2A, 0, 1, DATA, disk.nexus)
    lose_unseen(disk, backend)
    assert sense_of(disk.run(TEST_UNIT_READY)) == WRITE_ERROR


def test_a_flush_that_nobody_waited_for_tells_its_own_nexus_too(disk: Disk, backend: Faulty) -> None:
    write(disk)
    backend.fail(errno.EIO, "flush", times=1)
    assert not disk.run(FLUSH_SOON).status
    told = disk.run(FLUSH)
    assert sense_of(told) == WRITE_ERROR
    assert told.sense[0] & 0x7F == DEFERRED
    assert not disk.run(FLUSH).status


def test_it_waits_like_an_attention(disk: Disk, backend: Faulty) -> None:
    """INQUIRY goes on; REQUEST SENSE returns it, as a deferred error, and then it is told."""
    other = make_nexus(2)
    disk.login(other)
    write(disk, other)
    lose(disk, backend, by=disk.nexus)
    assert not disk.run(INQUIRY, nexus=other).status
    data = disk.read(REQUEST_SENSE, nexus=other)
    assert (data[0] & 0x7F, data[2] & 0x0F, data[12]) == (DEFERRED, 0x03, 0x0C)
    assert not disk.run(READ, nexus=other).status


def test_units_of_one_medium_tell_their_own_sessions(backend: Faulty) -> None:
    one, two = Disk(backend=backend), Disk(backend=backend)
    two.unit.share_medium(one.unit)
    for disk in (one, two):
        write(disk)
    backend.fail(errno.EIO, "flush", times=1)
    assert one.run(FLUSH).sense[0] & 0x7F == CURRENT
    assert two.run(READ).sense[0] & 0x7F == DEFERRED
    assert not one.run(READ).status


def test_a_medium_that_went_and_came_keeps_its_account(backend: Faulty) -> None:
    disk = Disk(backend=backend)
    write(disk)
    disk.unit.reconfigure(disk.unit.config, None)
    backend.lost_writes += 1
    disk.unit.reconfigure(disk.unit.config, backend)
    disk.unit.note_lost_writes()
    met = {sense_of(disk.run(TEST_UNIT_READY)) for _ in range(4)}
    assert WRITE_ERROR in met


def test_a_loss_that_another_is_told_during_a_flush_that_ends_well(disk: Disk, backend: Faulty) -> None:
    """The kernel gives the error to whoever comes first; the flush that comes second is told nothing."""
    lane = HeldLane()
    disk = Disk(backend=backend, lane=lane)
    write(disk)
    flush = disk.start(FLUSH)
    (work, done) = lane.jobs.pop()
    outcome = work()
    backend.lost_writes += 1  # by a durable write of another, whose end has not come to the loop yet
    done(outcome)
    assert not disk.delivered[flush].status
    told = disk.run(TEST_UNIT_READY)
    assert (sense_of(told), told.sense[0] & 0x7F) == (WRITE_ERROR, DEFERRED)


def test_a_loss_is_told_although_the_medium_is_opened_anew_at_once(disk: Disk, backend: Faulty) -> None:
    write(disk)
    backend.lost_writes += 1
    disk.unit.reconfigure(disk.unit.config, Memory(BLOCKS * BLOCK))
    met = [sense_of(disk.run(TEST_UNIT_READY)) for _ in range(3)]
    assert WRITE_ERROR in met


def test_an_opening_that_could_not_be_flushed_at_its_end_is_a_loss(disk: Disk) -> None:
    reader = make_nexus(2)
    disk.login(reader)
    write(disk)
    disk.unit.reconfigure(disk.unit.config, Memory(BLOCKS * BLOCK))
    disk.unit.lost_behind()
    assert sense_of(disk.run(TEST_UNIT_READY)) == WRITE_ERROR
    assert not disk.run(TEST_UNIT_READY, nexus=reader).status
