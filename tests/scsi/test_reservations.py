"""PERSISTENT RESERVE, RESERVE and RELEASE by CDB, between nexuses of one unit."""

from collections.abc import Callable

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.commands import Access
from protocol.scsi.device import Reset
from protocol.scsi.registrations import Action, Type
from protocol.scsi.request import Nexus, Outcome
from protocol.scsi.reservations import CONFLICTS, Reservations
from protocol.scsi.sense import Sense
from protocol.scsi.table import ROWS
from protocol.scsi.transportid import transport_id
from tests.scsi.support import (
    BLOCK,
    TARGET,
    Disk,
    HeldLane,
    Keeper,
    describe,
    make_nexus,
    sense_of,
    triple,
)

GOOD = ScsiStatus.GOOD
CONFLICT = ScsiStatus.RESERVATION_CONFLICT
INVALID_FIELD = triple(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
LENGTH_ERROR = triple(Sense.PARAMETER_LIST_LENGTH_ERROR)

READ10 = "28000000000000000100"
WRITE10 = "2a000000000000000100"
TUR = "000000000000"
MODE_SENSE = "1a003f00ff00"
INQUIRY = "12000000ff00"


class Cluster(Disk):
    """One unit and several nexuses, ``self.a``, ``self.b`` and ``self.c``."""

    def __init__(self, stored: bytes | None = None, **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self.reservations = self.unit.reservations = Reservations(stored)
        self.a = self.nexus
        self.b, self.c = make_nexus(2), make_nexus(3)
        self.login(self.b)
        self.login(self.c)

    def out(
        self,
        nexus: Nexus,
        action: Action,
        key: int = 0,
        sark: int = 0,
        type: int = 0,
        flags: int = 0,
        extra: bytes = b"",
        length: int | None = None,
    ) -> Outcome:
        data = key.to_bytes(8, "big") + sark.to_bytes(8, "big") + bytes(4) + bytes((flags, 0, 0, 0)) + extra
        size = len(data) if length is None else length
        cdb = bytes((0x5F, action, type, 0, 0)) + size.to_bytes(4, "big") + b"\0"
        return self.run(cdb, data, nexus=nexus)

    def register(self, *who: Nexus) -> None:
        for nexus in who:
            assert self.out(nexus, Action.REGISTER, 0, self.key(nexus)).status == GOOD

    def key(self, nexus: Nexus) -> int:
        return {self.a: 0xA, self.b: 0xB, self.c: 0xC}[nexus]

    def reserve(self, nexus: Nexus, type: int) -> None:
        assert self.out(nexus, Action.RESERVE, self.key(nexus), type=type).status == GOOD

    def report(self, action: int, allocation: int = 8192, nexus: Nexus | None = None) -> bytes:
        cdb = bytes((0x5E, action, 0, 0, 0, 0, 0)) + allocation.to_bytes(2, "big") + b"\0"
        return self.read(cdb, nexus=nexus)

    def status(self, nexus: Nexus, cdb: str) -> int:
        data = bytes(BLOCK) if cdb == WRITE10 else b""
        return self.run(cdb, data, nexus=nexus).status

    def attention(self, nexus: Nexus) -> Sense | None:
        return self.unit.attentions.take(nexus)


def status_of(outcome: Outcome) -> object:
    return sense_of(outcome) if outcome.sense else outcome.status


# -- who may do what (SPC-4 table 54) -----------------------------------------------------------------

WE, EA = Type.WRITE_EXCLUSIVE, Type.EXCLUSIVE_ACCESS
WERO, EARO = Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
WEAR, EAAR = Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS, Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS


@pytest.mark.parametrize(
    ("type", "registered", "read", "write"),
    [
        (WE, True, GOOD, CONFLICT),
        (WE, False, GOOD, CONFLICT),
        (EA, True, CONFLICT, CONFLICT),
        (EA, False, CONFLICT, CONFLICT),
        (WERO, True, GOOD, GOOD),
        (WERO, False, GOOD, CONFLICT),
        (EARO, True, GOOD, GOOD),
        (EARO, False, CONFLICT, CONFLICT),
        (WEAR, True, GOOD, GOOD),
        (WEAR, False, GOOD, CONFLICT),
        (EAAR, True, GOOD, GOOD),
        (EAAR, False, CONFLICT, CONFLICT),
    ],
)
def test_access_of_a_second_nexus(type: Type, registered: bool, read: int, write: int) -> None:
    """SPC-4 table 54; the holder itself is never shut out, and TEST UNIT READY passes always."""
    cluster = Cluster()
    cluster.register(cluster.a)
    if registered:
        cluster.register(cluster.b)
    cluster.reserve(cluster.a, type)
    assert cluster.status(cluster.a, READ10) == cluster.status(cluster.a, WRITE10) == GOOD
    assert cluster.status(cluster.b, READ10) == read
    assert cluster.status(cluster.b, WRITE10) == write
    assert cluster.status(cluster.b, TUR) == cluster.status(cluster.b, INQUIRY) == GOOD


@pytest.mark.parametrize(
    ("cdb", "under_write_exclusive", "under_exclusive_access"),
    [
        ("1e0000000000", GOOD, GOOD),
        ("1e0000000100", CONFLICT, CONFLICT),
        ("1b0000000100", GOOD, GOOD),
        ("1b0000000000", CONFLICT, CONFLICT),
        ("1b0000000200", CONFLICT, CONFLICT),
        ("1b0000001100", CONFLICT, CONFLICT),
    ],
)
def test_gentle_forms_of_prevent_and_start_pass(
    cdb: str, under_write_exclusive: int, under_exclusive_access: int
) -> None:
    """SPC-4 table 54: PREVENT=0; SBC-3 table 13: START=1 with POWER CONDITION 0."""
    for type, expected in ((WE, under_write_exclusive), (EA, under_exclusive_access)):
        cluster = Cluster(removable=True)
        cluster.register(cluster.a)
        cluster.reserve(cluster.a, type)
        assert cluster.status(cluster.b, cdb) == expected


def test_every_kind_of_access_has_a_verdict_and_every_row_a_kind() -> None:
    """The table is complete."""
    assert set(CONFLICTS) == set(Access)
    assert {row.access for row in ROWS} <= set(CONFLICTS)


def test_only_a_reservation_costs_the_others_a_look() -> None:
    """Registrations alone restrict nobody."""
    cluster = Cluster()
    cluster.register(cluster.a, cluster.b)
    assert not cluster.reservations.held
    cluster.reserve(cluster.a, WE)
    assert cluster.reservations.held
    assert cluster.out(cluster.a, Action.RELEASE, 0xA, type=WE).status == GOOD
    assert not cluster.reservations.held


# -- attentions ---------------------------------------------------------------------------------------


def test_attentions_reach_those_concerned_and_never_the_actor() -> None:
    """SPC-4 §5.13.11: 2Ah/03h, 04h, 05h."""
    cluster = Cluster()
    a, b, c = cluster.a, cluster.b, cluster.c
    cluster.register(a, b, c)
    cluster.reserve(a, WERO)
    cluster.out(a, Action.RELEASE, 0xA, type=WERO)
    assert [cluster.attention(n) for n in (a, b, c)] == [None, *[Sense.RESERVATIONS_RELEASED] * 2]
    cluster.out(a, Action.PREEMPT, 0xA, 0xB)
    assert [cluster.attention(n) for n in (a, b, c)] == [None, Sense.REGISTRATIONS_PREEMPTED, None]
    cluster.out(a, Action.CLEAR, 0xA)
    assert [cluster.attention(n) for n in (a, b, c)] == [None, None, Sense.RESERVATIONS_PREEMPTED]


def test_a_holder_that_unregisters_gets_no_attention_for_its_own_act() -> None:
    cluster = Cluster()
    cluster.register(cluster.a, cluster.b)
    cluster.reserve(cluster.a, EARO)
    assert cluster.out(cluster.a, Action.REGISTER, 0xA, 0).status == GOOD
    assert cluster.attention(cluster.a) is None
    assert cluster.attention(cluster.b) is Sense.RESERVATIONS_RELEASED


def test_preempt_and_abort_ends_the_tasks_of_who_is_preempted() -> None:
    """SPC-4 §5.13.11.5; a task of the preemptor goes on."""
    lane = HeldLane()
    cluster = Cluster(lane=lane)
    cluster.register(cluster.a, cluster.b)
    cluster.reserve(cluster.b, WERO)
    theirs = cluster.start("2f000000000000000100", nexus=cluster.b)
    ours = cluster.start("2f000000000000000100", nexus=cluster.a)
    assert cluster.out(cluster.a, Action.PREEMPT_AND_ABORT, 0xA, 0xB, type=WERO).status == GOOD
    assert theirs.aborted
    assert cluster.ended == [theirs]
    lane.release()
    assert theirs not in cluster.delivered
    assert cluster.delivered[ours].status == GOOD


def test_preempting_oneself_ends_ones_other_tasks_but_not_the_command() -> None:
    lane = HeldLane()
    cluster = Cluster(lane=lane)
    cluster.register(cluster.a)
    cluster.reserve(cluster.a, WE)
    other = cluster.start("2f000000000000000100", nexus=cluster.a)
    assert cluster.out(cluster.a, Action.PREEMPT_AND_ABORT, 0xA, 0xA, type=EA).status == GOOD
    assert cluster.ended == [other]


# -- PERSISTENT RESERVE IN (SPC-4 §6.15) --------------------------------------------------------------


def test_read_keys_gives_the_whole_length_whatever_is_cut() -> None:
    cluster = Cluster()
    cluster.register(cluster.a, cluster.b)
    whole = (
        (2).to_bytes(4, "big") + (16).to_bytes(4, "big") + (0xA).to_bytes(8, "big") + (0xB).to_bytes(8, "big")
    )
    assert cluster.report(0) == whole
    for allocation in (0, 4, 8, 12, 24):
        assert cluster.report(0, allocation) == whole[:allocation]


@pytest.mark.parametrize("type", list(Type)[1:])
def test_read_reservation_gives_key_and_type(type: Type) -> None:
    """Key 0 for all registrants types (§6.15.3.2)."""
    cluster = Cluster()
    cluster.register(cluster.a)
    assert cluster.report(1)[4:] == bytes(4)
    cluster.reserve(cluster.a, type)
    key = 0 if type in (WEAR, EAAR) else 0xA
    assert cluster.report(1)[4:] == bytes((0, 0, 0, 16)) + key.to_bytes(8, "big") + bytes(
        (0, 0, 0, 0, 0, type, 0, 0)
    )


@pytest.mark.parametrize(("keep", "expected"), [(None, "00081c80ea010000"), (Keeper(), "00081d80ea010000")])
def test_report_capabilities_is_honest(keep: Keeper | None, expected: str) -> None:
    """CRH, SIP_C, ATP_C, PTPL_C where it can be kept; TMV and every type."""
    assert Cluster(keep=keep).report(2).hex() == expected


def test_read_full_status_names_every_registrant() -> None:
    """SPC-4 table 218: key, R_HOLDER, scope and type, relative port, iSCSI TransportID."""
    cluster = Cluster()
    cluster.register(cluster.a, cluster.b)
    cluster.reserve(cluster.b, WE)
    data = cluster.report(3)
    assert int.from_bytes(data[4:8], "big") == len(data) - 8
    at, found = 8, []
    while at < len(data):
        size = int.from_bytes(data[at + 20 : at + 24], "big")
        name = data[at + 28 : at + 24 + size]
        assert data[at + 24] == 0x45
        assert size % 4 == 0
        assert int.from_bytes(data[at + 26 : at + 28], "big") == size - 4 == len(name)
        found.append((data[at + 7], data[at + 12], data[at + 13], data[at + 19], name.rstrip(b"\0").decode()))
        at += 24 + size
    assert found == [(0xA, 0, 0, 1, cluster.a.initiator_port), (0xB, 1, WE, 1, cluster.b.initiator_port)]
    assert cluster.report(3, 8) == data[:8]


@pytest.mark.parametrize("action", range(4, 0x20))
def test_unknown_service_actions_of_in_are_refused(action: int) -> None:
    outcome = Disk().run(bytes((0x5E, action, 0, 0, 0, 0, 0, 0, 255, 0)))
    assert sense_of(outcome) == triple(Sense.INVALID_FIELD_IN_CDB)


def test_prgeneration_counts_registrations_clear_and_preempt_only() -> None:
    """SPC-4 §6.15.2: neither RESERVE and RELEASE, nor what is refused."""
    cluster = Cluster()
    a, b = cluster.a, cluster.b
    steps: list[tuple[Callable[[], Outcome], int]] = [
        (lambda: cluster.out(a, Action.REGISTER, 0, 0xA), 1),
        (lambda: cluster.out(b, Action.REGISTER_AND_IGNORE_EXISTING_KEY, 7, 0xB), 2),
        (lambda: cluster.out(a, Action.RESERVE, 0xA, type=WE), 2),
        (lambda: cluster.out(b, Action.RESERVE, 0xB, type=WE), 2),
        (lambda: cluster.out(a, Action.RELEASE, 0xA, type=WE), 2),
        (lambda: cluster.out(a, Action.REGISTER, 0x99, 0xA), 2),
        (lambda: cluster.out(a, Action.PREEMPT, 0xA, 0xB), 3),
        (lambda: cluster.out(a, Action.CLEAR, 0xA), 4),
    ]
    for step, generation in steps:
        step()
        assert int.from_bytes(cluster.report(0)[:4], "big") == generation
        cluster.attention(b)


# -- parameter lists (SPC-4 §6.16.3) ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "flags", "extra", "length", "expected"),
    [
        (Action.REGISTER, 0, b"", 23, LENGTH_ERROR),
        (Action.REGISTER, 0, b"", 25, LENGTH_ERROR),
        (Action.REGISTER, 0, bytes(8), None, LENGTH_ERROR),
        (Action.RESERVE, 0, bytes(8), None, LENGTH_ERROR),
        (Action.REGISTER, 0x08, b"", None, LENGTH_ERROR),
        (Action.REGISTER, 0x08, bytes((0, 0, 0, 8)), None, INVALID_FIELD),
        (Action.REGISTER, 0x08, bytes((0, 0, 0, 4)) + bytes(4), None, INVALID_FIELD),
        (Action.CLEAR, 0x08, bytes(4), None, INVALID_FIELD),
        (Action.REGISTER, 0x01, b"", None, INVALID_FIELD),
        (Action.REGISTER, 0x00, b"", 1 << 20, LENGTH_ERROR),
    ],
)
def test_malformed_parameter_lists_are_refused(
    action: Action, flags: int, extra: bytes, length: int | None, expected: object
) -> None:
    """APTPL too, where nothing can be kept (PTPL_C=0)."""
    cluster = Cluster()
    outcome = cluster.out(cluster.a, action, 0, 1, flags=flags, extra=extra, length=length)
    assert status_of(outcome) == expected, describe(outcome)
    assert cluster.report(0)[4:] == bytes(4)


def listed(*identifiers: bytes) -> bytes:
    body = b"".join(identifiers)
    return len(body).to_bytes(4, "big") + body


def test_spec_i_pt_registers_nexuses_that_are_not_there() -> None:
    """A port by name and ISID, and a device by its name alone: all its sessions."""
    cluster = Cluster()
    absent = make_nexus(9)
    device = bytes((0x05, 0, 0, 40)) + cluster.b.initiator_name.encode().ljust(40, b"\0")
    extra = listed(transport_id(absent.initiator_port), device)
    assert cluster.out(cluster.a, Action.REGISTER, 0, 0xA, flags=0x08, extra=extra).status == GOOD
    assert int.from_bytes(cluster.report(0)[4:8], "big") == 3 * 8
    cluster.reserve(cluster.a, EARO)
    cluster.login(absent)
    assert cluster.status(absent, READ10) == cluster.status(cluster.b, READ10) == GOOD
    assert cluster.status(cluster.c, READ10) == CONFLICT


@pytest.mark.parametrize(
    "identifier",
    [
        bytes((0x45, 0, 0, 16)) + b"iqn.x,i,0x000001".ljust(16, b"\0"),
        bytes((0x45, 0, 0, 20)) + b"iqn.x,i,0x00000000g1",
        bytes((0x45, 0, 0, 20)) + b"iqn.x".ljust(20, b"\0"),
        bytes((0x45, 0, 0, 24)) + b"iqn.x".ljust(20, b"\0"),
        bytes((0x46, 0, 0, 20)) + b"iqn.x,i,0x000000".ljust(20, b"\0"),
        bytes((0x05, 0, 0, 20)) + b"iqn.nobody".ljust(20, b"\0"),
        bytes((0x45, 0, 0, 20)) + b"\xff" * 20,
    ],
)
def test_transport_ids_that_name_nobody_are_refused(identifier: bytes) -> None:
    """SPC-4 §7.6.4.6."""
    cluster = Cluster()
    outcome = cluster.out(cluster.a, Action.REGISTER, 0, 0xA, flags=0x08, extra=listed(identifier))
    assert status_of(outcome) == INVALID_FIELD


def test_all_tg_pt_covers_the_other_portal_groups_of_the_target() -> None:
    cluster = Cluster()
    elsewhere = Nexus(cluster.a.initiator_name, bytes.fromhex("000000000001"), TARGET, 2)
    cluster.login(elsewhere)
    assert cluster.out(cluster.a, Action.REGISTER, 0, 0xA, flags=0x04).status == GOOD
    cluster.reserve(cluster.a, EARO)
    assert cluster.status(elsewhere, WRITE10) == GOOD
    assert cluster.status(cluster.b, WRITE10) == CONFLICT


def move(cluster: Cluster, to: str, port: int = 1, flags: int = 0) -> Outcome:
    name = transport_id(to)
    data = (0xA).to_bytes(8, "big") + (0xB).to_bytes(8, "big") + bytes((0, flags)) + port.to_bytes(2, "big")
    data += len(name).to_bytes(4, "big") + name
    return cluster.run(b"\x5f\x07\0\0\0" + len(data).to_bytes(4, "big") + b"\0", data)


def test_register_and_move_hands_the_reservation_over() -> None:
    """SPC-4 §5.13.8."""
    cluster = Cluster()
    cluster.register(cluster.a)
    cluster.reserve(cluster.a, EA)
    assert status_of(move(cluster, cluster.b.initiator_port, port=7)) == INVALID_FIELD
    assert status_of(move(cluster, cluster.a.initiator_port)) == INVALID_FIELD
    assert move(cluster, cluster.b.initiator_port, flags=0x02).status == GOOD
    assert cluster.status(cluster.b, WRITE10) == GOOD
    assert cluster.status(cluster.a, READ10) == CONFLICT
    assert cluster.attention(cluster.a) is cluster.attention(cluster.b) is None


# -- APTPL: kept before GOOD --------------------------------------------------------------------------


class SlowKeeper:
    """Has it when the test says so."""

    def __init__(self) -> None:
        self.pending: list[tuple[bytes, Callable[[Exception | None], None]]] = []

    def __call__(self, what: str, value: bytes, done: Callable[[Exception | None], None]) -> None:
        assert what == "reservations"
        self.pending.append((value, done))

    def answer(self, error: Exception | None = None) -> bytes:
        value, done = self.pending.pop(0)
        done(error)
        return value


def start_out(
    cluster: Cluster, nexus: Nexus, action: Action, key: int, sark: int, type: int = 0, flags: int = 0
):
    data = key.to_bytes(8, "big") + sark.to_bytes(8, "big") + bytes(4) + bytes((flags, 0, 0, 0))
    return cluster.start(bytes((0x5F, action, type, 0, 0, 0, 0, 0, 24, 0)), data, nexus=nexus)


def test_a_command_under_aptpl_takes_effect_and_ends_when_it_has_been_kept() -> None:
    """SPC-4 §5.13.5: GOOD only when the information is in nonvolatile memory."""
    keeper = SlowKeeper()
    cluster = Cluster(keep=keeper)
    first = start_out(cluster, cluster.a, Action.REGISTER, 0, 0xA, flags=1)
    second = start_out(cluster, cluster.b, Action.REGISTER, 0, 0xB, flags=1)
    assert first not in cluster.delivered
    assert cluster.report(0)[4:] == bytes(4)
    keeper.answer()
    assert cluster.delivered[first].status == GOOD
    assert second not in cluster.delivered
    stored = keeper.answer()
    assert cluster.delivered[second].status == GOOD
    third = start_out(cluster, cluster.a, Action.RESERVE, 0xA, 0, WE)
    assert cluster.status(cluster.b, WRITE10) == GOOD
    stored = keeper.answer()
    assert cluster.delivered[third].status == GOOD
    assert cluster.status(cluster.b, WRITE10) == CONFLICT

    restarted = Cluster(stored=stored, keep=keeper)
    assert restarted.status(restarted.b, WRITE10) == CONFLICT
    assert restarted.status(restarted.a, WRITE10) == GOOD
    assert restarted.report(0) == bytes((0, 0, 0, 0, 0, 0, 0, 16)) + b"".join(
        key.to_bytes(8, "big") for key in (0xA, 0xB)
    )


def test_what_cannot_be_kept_changes_nothing() -> None:
    keeper = SlowKeeper()
    cluster = Cluster(keep=keeper)
    first = start_out(cluster, cluster.a, Action.REGISTER, 0, 0xA, flags=1)
    second = start_out(cluster, cluster.a, Action.REGISTER, 0xA, 0xE, flags=1)
    keeper.answer(OSError(28, "No space left on device"))
    assert sense_of(cluster.delivered[first]) == triple(Sense.INSUFFICIENT_REGISTRATION_RESOURCES)
    assert cluster.delivered[second].status == CONFLICT, "the key it gives was never registered"
    assert cluster.report(0) == bytes(8)


def test_turning_aptpl_off_is_kept_too() -> None:
    """Else a restart would bring back what is gone."""
    keeper = Keeper()
    cluster = Cluster(keep=keeper)
    cluster.out(cluster.a, Action.REGISTER, 0, 0xA, flags=1)
    assert keeper.values["reservations"]
    cluster.out(cluster.a, Action.REGISTER, 0xA, 0xA)
    assert keeper.values["reservations"] == b""


def test_an_aborted_command_that_waits_its_turn_does_nothing() -> None:
    keeper = SlowKeeper()
    cluster = Cluster(keep=keeper)
    start_out(cluster, cluster.a, Action.REGISTER, 0, 0xA, flags=1)
    second = start_out(cluster, cluster.b, Action.REGISTER, 0, 0xB, flags=1)
    cluster.unit.abort(second)
    keeper.answer()
    assert not keeper.pending
    assert second not in cluster.delivered
    assert len(cluster.report(0)) == 16


# -- RESERVE and RELEASE (SPC-2 §5.5; SPC-4 §5.13.3) ---------------------------------------------------

RESERVES = ["160000000000", "56000000000000000000"]
RELEASES = ["170000000000", "57000000000000000000"]


@pytest.mark.parametrize(("reserve", "release"), list(zip(RESERVES, RELEASES, strict=True)))
def test_reserve_shuts_everybody_else_out_until_released(reserve: str, release: str) -> None:
    cluster = Cluster()
    a, b = cluster.a, cluster.b
    assert cluster.status(a, reserve) == cluster.status(a, reserve) == GOOD
    for cdb in (READ10, WRITE10, TUR, MODE_SENSE, reserve):
        assert cluster.status(b, cdb) == CONFLICT
    for cdb in (INQUIRY, release, "a00000000000000002000000", "030000001200"):
        assert cluster.status(b, cdb) == GOOD
    assert cluster.status(b, READ10) == CONFLICT, "its RELEASE had no effect"
    assert cluster.status(a, WRITE10) == cluster.status(a, release) == GOOD
    assert cluster.status(b, WRITE10) == GOOD


@pytest.mark.parametrize(
    "end",
    [
        lambda cluster: cluster.unit.reset(None, Reset.LOGICAL_UNIT),
        lambda cluster: cluster.target.reset(None, Reset.TARGET_WARM),
        lambda cluster: cluster.target.detach(cluster.a),
        lambda cluster: cluster.target.nexus_lost(cluster.a),
    ],
    ids=["lun reset", "target reset", "logout", "nexus lost"],
)
def test_reserve_ends_with_resets_and_with_its_session_but_persistent_ones_stay(end) -> None:
    cluster = Cluster()
    cluster.status(cluster.a, RESERVES[0])
    end(cluster)
    cluster.attention(cluster.b)
    assert cluster.status(cluster.b, WRITE10) == GOOD

    cluster = Cluster()
    cluster.register(cluster.a)
    cluster.reserve(cluster.a, WE)
    end(cluster)
    cluster.attention(cluster.b)
    assert cluster.status(cluster.b, WRITE10) == CONFLICT


def test_persistent_and_old_reservations_exclude_each_other() -> None:
    """SPC-2 §5.5.1; §5.13.3: registrations make RESERVE conflict."""
    cluster = Cluster()
    cluster.status(cluster.a, RESERVES[0])
    assert cluster.out(cluster.a, Action.REGISTER, 0, 0xA).status == CONFLICT
    assert cluster.status(cluster.b, "5e000000000000002000") == CONFLICT
    cluster.status(cluster.a, RELEASES[0])
    cluster.register(cluster.a)
    assert cluster.status(cluster.a, RESERVES[0]) == cluster.status(cluster.b, RESERVES[0]) == CONFLICT


@pytest.mark.parametrize("type", list(Type)[1:])
def test_compatible_reservation_handling(type: Type) -> None:
    """CRH=1: who has access by a persistent reservation may RESERVE and RELEASE, without effect."""
    cluster = Cluster()
    cluster.register(cluster.a, cluster.b)
    cluster.reserve(cluster.a, type)
    shared = type not in (WE, EA)
    for cdb in (*RESERVES, *RELEASES):
        assert cluster.status(cluster.a, cdb) == GOOD
        assert cluster.status(cluster.b, cdb) == (GOOD if shared else CONFLICT)
        assert cluster.status(cluster.c, cdb) == CONFLICT
    assert cluster.reservations.reserved_by is None


# -- a cluster's life ---------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [WERO, EARO, EAAR])
def test_failover_of_a_cluster_disk(type: Type) -> None:
    """Register on two nodes, reserve, lose the owner, take over by force, come back fenced, restart."""
    keeper = Keeper()
    cluster = Cluster(keep=keeper)
    a, b = cluster.a, cluster.b
    for nexus in (a, b):
        assert (
            cluster.out(nexus, Action.REGISTER_AND_IGNORE_EXISTING_KEY, 0, cluster.key(nexus), flags=1).status
            == GOOD
        )
    cluster.reserve(a, type)
    cluster.target.detach(a)
    victim = 0 if type == EAAR else 0xA
    assert cluster.out(b, Action.PREEMPT_AND_ABORT, 0xB, victim, type=type).status == GOOD
    cluster.login(a)
    assert cluster.status(a, WRITE10) == CONFLICT
    assert cluster.status(b, WRITE10) == GOOD

    again = Cluster(stored=keeper.values["reservations"], keep=keeper)
    assert again.status(again.a, WRITE10) == CONFLICT
    assert again.status(again.b, WRITE10) == GOOD
    assert again.out(again.a, Action.REGISTER, 0, 0xA, flags=1).status == GOOD
    assert again.status(again.a, WRITE10) == GOOD
