"""What may run beside what, and how tasks end early (SAM-5 §7, §8.6)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.enums import ScsiStatus, TaskAttribute
from protocol.scsi.request import Request
from protocol.scsi.sense import CheckCondition, Sense
from storage.base import Buffer
from storage.memory import Memory
from tests import cdbs
from tests.scsi.support import BLOCK, BLOCKS, Disk, HeldLane, make_config, make_nexus, sense_of, triple

SIMPLE, ORDERED, HEAD = TaskAttribute.SIMPLE, TaskAttribute.ORDERED, TaskAttribute.HEAD_OF_QUEUE
GOOD = ScsiStatus.GOOD
CLEARED = triple(Sense.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR)


class Cold(Memory):
    """Nothing can be had without waiting, so everything goes to the lane."""

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return None

    def copy_nowait(self, offset: int, length: int) -> Buffer | None:
        return None

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return False


def read(lba: int, blocks: int = 1) -> bytes:
    return b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def write(lba: int, blocks: int = 1) -> bytes:
    return b"\x2a\0" + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def compare_and_write(lba: int) -> bytes:
    return b"\x89\0" + lba.to_bytes(8, "big") + bytes((0, 0, 0, 1, 0, 0))


NAA = bytes.fromhex(make_config().naa[2:])
OLD, NEW, OTHER = bytes(BLOCK), b"n" * BLOCK, b"o" * BLOCK


@pytest.fixture
def lane() -> HeldLane:
    return HeldLane()


@pytest.fixture
def disk(lane: HeldLane) -> Disk:
    return Disk(backend=Cold(BLOCKS * BLOCK), lane=lane)


def under_way(lane: HeldLane) -> int:
    return len(lane.jobs)


# -- task attributes: (older, younger, does the younger wait?) (SAM-5 §8.6) ------------------------------

ATTRIBUTES = [
    (SIMPLE, SIMPLE, False),
    (SIMPLE, ORDERED, True),
    (SIMPLE, HEAD, False),
    (ORDERED, SIMPLE, True),
    (ORDERED, ORDERED, True),
    (ORDERED, HEAD, False),
    (HEAD, SIMPLE, True),
    (HEAD, ORDERED, True),
    (HEAD, HEAD, False),
    (TaskAttribute.UNTAGGED, ORDERED, True),
]


@pytest.mark.parametrize(("older", "younger", "waits"), ATTRIBUTES)
def test_attributes_order_tasks(
    disk: Disk, lane: HeldLane, older: TaskAttribute, younger: TaskAttribute, waits: bool
) -> None:
    first = disk.start(read(0), attribute=older)
    second = disk.start(read(100), attribute=younger)
    assert under_way(lane) == (1 if waits else 2)
    lane.release()
    assert disk.delivered[first].status == GOOD
    lane.release()
    assert disk.delivered[second].status == GOOD
    assert not disk.unit.tasks
    third = disk.request(read(0))
    assert disk.unit.admit(third) is None
    assert disk.unit.submit(third) is None
    assert under_way(lane) == 1


def test_an_ordered_task_that_awaits_its_data_holds_back_later_ones(disk: Disk, lane: HeldLane) -> None:
    ordered = disk.request(write(0), NEW, attribute=ORDERED)
    assert disk.unit.admit(ordered) is None
    later = disk.start(read(0))
    assert under_way(lane) == 0
    assert disk.unit.submit(ordered) is None
    lane.release()
    assert under_way(lane) == 1
    lane.release()
    assert bytes(disk.delivered[later].data_in) == NEW


def test_what_was_held_back_is_delivered_in_order_even_where_nothing_waits() -> None:
    disk = Disk()
    ordered = disk.request(write(0), NEW, attribute=ORDERED)
    assert disk.unit.admit(ordered) is None
    later = [disk.start(read(0)) for _ in range(3)]
    assert disk.delivered == {}
    assert disk.unit.submit(ordered) is None
    assert list(disk.delivered) == [ordered, *later]


# -- ranges -----------------------------------------------------------------------------------------------


def test_nothing_comes_between_compare_and_write(disk: Disk, lane: HeldLane) -> None:
    """SBC-3 §5.2: uninterrupted; two races have one winner."""
    first = disk.start(compare_and_write(5), OLD + NEW)
    second = disk.start(compare_and_write(5), OLD + OTHER)
    beside = disk.start(compare_and_write(6), OLD + NEW)
    reader = disk.start(read(0, 16))
    assert under_way(lane) == 2  # first and beside
    lane.release()
    assert disk.delivered[first].status == disk.delivered[beside].status == GOOD
    assert under_way(lane) == 1  # the reader was after the second
    lane.release()
    assert sense_of(disk.delivered[second]) == triple(Sense.MISCOMPARE_DURING_VERIFY)
    lane.release()
    assert bytes(disk.delivered[reader].data_in)[5 * BLOCK : 7 * BLOCK] == NEW + NEW


def test_compare_and_write_waits_for_what_runs_on_its_range(disk: Disk, lane: HeldLane) -> None:
    disk.start(write(4, 2), NEW + NEW)
    disk.start(write(7), NEW)
    exclusive = disk.start(compare_and_write(5), NEW + OTHER)
    assert under_way(lane) == 2
    lane.release(1)
    assert under_way(lane) == 2
    lane.release()
    assert disk.delivered[exclusive].status == GOOD


def test_an_aborted_write_cannot_land_after_a_later_one(disk: Disk, lane: HeldLane) -> None:
    """The thread is stuck in the medium: the abort is done at once, and a later write waits for it there."""
    stuck = disk.start(write(3), OLD)
    assert disk.unit.abort(stuck)
    assert not disk.unit.tasks
    later = disk.start(write(3), NEW)
    elsewhere = disk.start(write(9), NEW)
    assert under_way(lane) == 2  # the stuck one and elsewhere
    lane.release()
    assert stuck not in disk.delivered
    assert disk.delivered[elsewhere].status == GOOD
    lane.release()
    assert disk.delivered[later].status == GOOD
    reader = disk.start(read(3))
    lane.release()
    assert bytes(disk.delivered[reader].data_in) == NEW


def test_an_aborted_read_or_flush_holds_nobody_up(disk: Disk, lane: HeldLane) -> None:
    for cdb in (read(3), bytes((0x35, *bytes(9)))):
        disk.unit.abort(disk.start(cdb))
    disk.start(write(3), NEW)
    assert under_way(lane) == 3


def test_aborting_what_waits_lets_those_behind_it_go(disk: Disk, lane: HeldLane) -> None:
    disk.start(read(0))
    ordered = disk.start(read(1), attribute=ORDERED)
    disk.start(read(2))
    assert under_way(lane) == 1
    disk.unit.abort(ordered)
    assert under_way(lane) == 2


def test_an_abort_of_what_has_ended_finds_nothing(disk: Disk, lane: HeldLane) -> None:
    request = disk.start(read(0))
    lane.release()
    assert not disk.unit.abort(request)
    assert disk.delivered[request].status == GOOD


def test_a_task_aborted_before_its_data_came_does_not_run(disk: Disk, lane: HeldLane) -> None:
    request = disk.request(write(0), NEW)
    assert disk.unit.admit(request) is None
    disk.unit.abort(request)
    outcome = disk.unit.submit(request)
    assert outcome is not None and outcome.status == ScsiStatus.TASK_ABORTED
    assert under_way(lane) == 0


def test_a_task_given_up_for_its_data_lets_those_behind_it_go(disk: Disk, lane: HeldLane) -> None:
    """RFC 7143 §11.4.7.2: the transport ends it with sense of its own; it never ran."""
    ordered = disk.request(write(0), NEW, attribute=ORDERED)
    assert disk.unit.admit(ordered) is None
    later = disk.start(read(0))
    outcome = disk.unit.give_up(ordered, CheckCondition(Sense.INCORRECT_AMOUNT_OF_DATA))
    assert sense_of(outcome) == (0x0B, 0x0C, 0x0D)
    assert disk.unit.failures[0x2A, ScsiStatus.CHECK_CONDITION] == 1
    lane.release()
    assert bytes(disk.delivered[later].data_in) == OLD
    assert not disk.unit.tasks


def test_units_over_one_medium_keep_each_others_exclusive_ranges(lane: HeldLane) -> None:
    """An extent that two targets show differently: COMPARE AND WRITE is atomic across both."""
    backend = Cold(BLOCKS * BLOCK)
    one, two = Disk(backend=backend, lane=lane), Disk(backend=backend, lane=lane, serial="2")
    two.unit.share_medium(one.unit)
    first = one.start(compare_and_write(5), OLD + NEW)
    second = two.start(compare_and_write(5), OLD + OTHER)
    reader = two.start(read(5))
    beside = two.start(read(6))
    assert under_way(lane) == 2
    lane.release()
    assert one.delivered[first].status == GOOD
    assert two.delivered[beside].status == GOOD
    lane.release()
    assert sense_of(two.delivered[second]) == triple(Sense.MISCOMPARE_DURING_VERIFY)
    lane.release()
    assert bytes(two.delivered[reader].data_in) == NEW
    two.unit.abort(two.start(write(5), OLD))
    one.start(write(5), OTHER)
    assert under_way(lane) == 1
    lane.release()
    assert under_way(lane) == 1


# -- task management over many tasks (SAM-5 §7) ---------------------------------------------------------


def busy(disk: Disk) -> tuple[list[Request], list[Request]]:
    """Three tasks of each of two nexuses: running, waiting, awaiting data."""
    other = make_nexus(2)
    disk.login(other)
    found: list[list[Request]] = []
    for nexus in (disk.nexus, other):
        running = disk.start(write(0), NEW, nexus=nexus)
        pending = disk.request(write(8), NEW, nexus=nexus)
        assert disk.unit.admit(pending) is None
        found.append([running, pending])
    for tasks in found:
        tasks.append(disk.start(read(20), nexus=tasks[0].nexus, attribute=ORDERED))
    return found[0], found[1]


def test_abort_task_set_ends_the_callers_tasks_only(disk: Disk, lane: HeldLane) -> None:
    own, others = busy(disk)
    assert set(disk.unit.abort_task_set(disk.nexus)) == set(own)
    assert set(disk.unit.tasks) == set(others)
    assert disk.ended == []
    assert disk.unit.submit(others[1]) is None
    for _ in range(3):
        lane.release()
    assert set(disk.delivered) == set(others)
    for nexus in disk.unit.nexuses:
        assert disk.run("000000000000", nexus=nexus).status == GOOD


def test_clear_task_set_tells_the_others_by_attention(disk: Disk, lane: HeldLane) -> None:
    """SAM-5 §7.5, SPC-4 §7.5.8 TAS=0: no status for the others' tasks, but 2Fh/00h."""
    own, others = busy(disk)
    assert set(disk.unit.clear_task_set(disk.nexus)) == set(own)
    assert set(disk.ended) == set(others)
    assert not disk.unit.tasks
    lane.release()
    assert disk.delivered == {}
    assert disk.run("000000000000").status == GOOD
    assert sense_of(disk.run("000000000000", nexus=others[0].nexus)) == CLEARED


def test_a_reset_ends_everything(disk: Disk, lane: HeldLane) -> None:
    own, others = busy(disk)
    assert set(disk.unit.reset(disk.nexus)) == set(own)
    assert set(disk.ended) == set(others)
    lane.release()
    assert disk.delivered == {}
    assert not disk.unit.tasks
    disk.run("000000000000")
    assert disk.run("000000000000").status == GOOD


def test_a_preempted_nexus_loses_its_tasks(disk: Disk, lane: HeldLane) -> None:
    """SPC-4 §5.13.11.5: PREEMPT AND ABORT."""
    own, others = busy(disk)
    disk.unit.preempt(others[0].nexus, disk.nexus)
    assert set(disk.ended) == set(others)
    assert set(disk.unit.tasks) == set(own)
    assert sense_of(disk.run("000000000000", nexus=others[0].nexus)) == CLEARED


def test_a_lost_nexus_leaves_the_others_tasks(disk: Disk, lane: HeldLane) -> None:
    own, others = busy(disk)
    assert set(disk.target.nexus_lost(disk.nexus)) == set(own)
    assert set(disk.unit.tasks) == set(others)
    assert sense_of(disk.run("000000000000")) == triple(Sense.I_T_NEXUS_LOSS)


def test_after_everything_the_hot_path_is_clear_again(disk: Disk, lane: HeldLane) -> None:
    """No barrier, no order and nothing waiting is left behind: what can be answered at once is."""
    busy(disk)
    disk.start(compare_and_write(5), OLD + NEW)
    disk.unit.reset(None)
    while lane.jobs:
        lane.release()
    for nexus in disk.unit.nexuses:
        disk.run("000000000000", nexus=nexus)
    request = disk.request("000000000000")
    assert disk.unit.admit(request) is None
    outcome = disk.unit.submit(request)
    assert outcome is not None and outcome.status == GOOD


# -- any mixture ------------------------------------------------------------------------------------------

KINDS = st.sampled_from(["read", "write", "compare", "inquiry", "copy"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("new"), KINDS, st.integers(0, 5), st.sampled_from([SIMPLE, ORDERED, HEAD])),
        st.tuples(st.just("submit"), st.integers(0, 7)),
        st.tuples(st.just("abort"), st.integers(0, 7)),
        st.tuples(st.just("release"), st.integers(1, 3)),
    ),
    max_size=60,
)


def make(disk: Disk, kind: str, lba: int, attribute: TaskAttribute) -> Request:
    cdb, data = {
        "read": (read(lba, 2), b""),
        "write": (write(lba, 2), NEW + NEW),
        "compare": (compare_and_write(lba), OLD + NEW),
        "inquiry": (bytes.fromhex("120000002400"), b""),
        "copy": cdbs.extended_copy(NAA, NAA, [(lba, lba + 1, 2), (lba + 3, lba, 2)]),
    }[kind]
    return disk.request(cdb, data, attribute=attribute)


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_whatever_comes_every_task_ends_exactly_once(steps: list[tuple[object, ...]]) -> None:
    """No mixture of attributes, ranges, data that comes late and aborts leaves a task waiting for ever."""
    lane = HeldLane()
    disk = Disk(backend=Cold(BLOCKS * BLOCK), lane=lane)
    ended: list[Request] = []
    disk.unit.deliver = lambda request, outcome: ended.append(request)
    admitted: list[Request] = []  # and not submitted yet
    alive: list[Request] = []
    aborted: set[Request] = set()

    def submit(request: Request) -> None:
        if disk.unit.submit(request) is not None:
            ended.append(request)

    for step in steps:
        match step:
            case ("new", str(kind), int(lba), attribute):
                request = make(disk, kind, lba, attribute)  # type: ignore[arg-type]
                assert disk.unit.admit(request) is None
                admitted.append(request)
                alive.append(request)
            case ("submit", int(index)) if index < len(admitted):
                submit(admitted.pop(index))
            case ("abort", int(index)) if index < len(alive):
                request = alive.pop(index)
                if disk.unit.abort(request):
                    aborted.add(request)
                    if request in admitted:
                        admitted.remove(request)
            case ("release", int(count)):
                lane.release(count)
    everything = set(alive) | set(ended)
    for request in admitted:
        submit(request)
    while lane.jobs:
        lane.release()
    assert len(ended) == len(set(ended))
    assert set(ended) == everything - aborted
    assert not disk.unit.tasks
    last = disk.request("000000000000")
    assert disk.unit.admit(last) is None
    assert disk.unit.submit(last) is not None
