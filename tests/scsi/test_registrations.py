"""What each service action of PERSISTENT RESERVE OUT makes of a state (SPC-4 r37 §5.13)."""

from dataclasses import replace

import pytest

from protocol.scsi.registrations import (
    ACTIONS,
    ALL_TG_PT,
    APTPL,
    MAXIMUM_REGISTRATIONS,
    SPEC_I_PT,
    Action,
    Change,
    Order,
    Ports,
    State,
    Type,
)
from protocol.scsi.request import Nexus
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense
from protocol.scsi.transportid import transport_id

ALICE: Ports = ("iqn.a,i,0x000000000001", "iqn.t,t,0x0001")
BOB: Ports = ("iqn.b,i,0x000000000002", "iqn.t,t,0x0001")
CAROL: Ports = ("iqn.c,i,0x000000000003", "iqn.t,t,0x0001")
KEYS = {ALICE: 0xA, BOB: 0xB, CAROL: 0xC}

SINGLE = [Type.WRITE_EXCLUSIVE, Type.EXCLUSIVE_ACCESS]
REGISTRANTS_ONLY = [Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY]
ALL_REGISTRANTS = [Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS, Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS]
SHARED = REGISTRANTS_ONLY + ALL_REGISTRANTS
TYPES = SINGLE + SHARED

CONFLICT = ReservationConflict
INVALID_FIELD = Sense.INVALID_FIELD_IN_PARAMETER_LIST


def state(*who: Ports, type: Type = Type.NONE, holder: Ports | None = None) -> State:
    made = State({ports: KEYS[ports] for ports in who})
    return made.reserved(type, holder or who[0]) if type else made


def order(
    who: Ports, key: int | None = None, sark: int = 0, type: int = 0, scope: int = 0, flags: int = 0, **more
) -> Order:
    own = more.pop("own", (who,))
    return Order(who, type, scope, KEYS[who] if key is None else key, sark, flags, own, **more)


def do(action: Action, before: State, wanted: Order) -> Change:
    return ACTIONS[action](before, wanted)


def refused(action: Action, before: State, wanted: Order, how: object) -> None:
    if how is CONFLICT:
        with pytest.raises(ReservationConflict):
            do(action, before, wanted)
    else:
        with pytest.raises(CheckCondition) as caught:
            do(action, before, wanted)
        assert caught.value.sense is how


# -- REGISTER (tables 59, 60) -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "wanted", "keys"),
    [
        (state(), order(ALICE, 0, 0xA), {ALICE: 0xA}),
        (state(), order(ALICE, 0, 0), {}),
        (state(ALICE), order(ALICE, 0xA, 0xE), {ALICE: 0xE}),
        (state(ALICE, BOB), order(ALICE, 0xA, 0), {BOB: 0xB}),
        (
            state(),
            order(ALICE, 0, 0xA, flags=SPEC_I_PT, others=(BOB, CAROL)),
            {ALICE: 0xA, BOB: 0xA, CAROL: 0xA},
        ),
        (state(BOB), order(ALICE, 0, 0xA, flags=SPEC_I_PT, others=(BOB,)), {ALICE: 0xA, BOB: 0xB}),
    ],
    ids=["new", "nothing", "change", "end", "specified", "specified already"],
)
def test_register_sets_changes_and_ends_registrations(
    before: State, wanted: Order, keys: dict[Ports, int]
) -> None:
    change = do(Action.REGISTER, before, wanted)
    assert change.state.registrations == keys
    assert change.counts
    assert change.attentions == ()


@pytest.mark.parametrize(
    ("before", "wanted", "how"),
    [
        (state(), order(ALICE, 0xA, 0xA), CONFLICT),
        (state(ALICE), order(ALICE, 0xB, 0xE), CONFLICT),
        (state(ALICE), order(ALICE, 0, 0xE), CONFLICT),
        (state(ALICE), order(ALICE, 0xA, 0xE, flags=SPEC_I_PT, others=(BOB,)), INVALID_FIELD),
    ],
)
def test_register_wants_the_key_that_is_registered(before: State, wanted: Order, how: object) -> None:
    refused(Action.REGISTER, before, wanted, how)


def test_register_and_ignore_existing_key_ignores_it() -> None:
    change = do(Action.REGISTER_AND_IGNORE_EXISTING_KEY, state(ALICE), order(ALICE, 0x99, 0xE))
    assert change.state.registrations == {ALICE: 0xE}
    refused(
        Action.REGISTER_AND_IGNORE_EXISTING_KEY, state(), order(ALICE, 0, 1, flags=SPEC_I_PT), INVALID_FIELD
    )


def test_all_tg_pt_registers_through_every_target_port() -> None:
    other = (ALICE[0], "iqn.t,t,0x0002")
    wanted = order(ALICE, 0, 0xA, flags=ALL_TG_PT, own=(ALICE, other))
    assert do(Action.REGISTER, state(), wanted).state.registrations == {ALICE: 0xA, other: 0xA}


def test_aptpl_is_what_the_last_registration_said() -> None:
    """§5.13.5."""
    on = do(Action.REGISTER, state(), order(ALICE, 0, 0xA, flags=APTPL)).state
    assert on.aptpl
    assert do(Action.RESERVE, on, order(ALICE, type=1)).state.aptpl
    assert not do(Action.REGISTER, on, order(BOB, 0, 0xB)).state.aptpl
    assert do(Action.REGISTER, on, order(BOB, 0, 0)).state.aptpl, "nothing was registered"


def test_registrations_are_bounded() -> None:
    full = State({(f"i{n}", "t"): 1 for n in range(MAXIMUM_REGISTRATIONS)})
    refused(Action.REGISTER, full, order(ALICE, 0, 1), Sense.INSUFFICIENT_REGISTRATION_RESOURCES)


@pytest.mark.parametrize("type", TYPES)
def test_the_end_of_the_holders_registration_releases_what_nobody_holds_any_more(type: Type) -> None:
    """§5.13.11.2: the last registrant's for all registrants types; others learn it of shared types."""
    before = state(ALICE, BOB, CAROL, type=type)
    change = do(Action.REGISTER, before, order(ALICE, sark=0))
    if type in ALL_REGISTRANTS:
        assert change.state.type == type
        assert change.attentions == ()
        last = do(Action.REGISTER, state(ALICE, type=type), order(ALICE, sark=0)).state
        assert last.type == Type.NONE
        return
    assert change.state.type == Type.NONE
    told = {BOB, CAROL} if type in SHARED else set()
    assert set(change.attentions) == {(ports, Sense.RESERVATIONS_RELEASED) for ports in told}
    assert do(Action.REGISTER, before, order(BOB, sark=0)).state.type == type


# -- RESERVE, RELEASE, CLEAR --------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_reserve_takes_a_free_unit_and_repeats_itself(type: Type) -> None:
    """§5.13.9; PRGENERATION does not count it (§6.15.2)."""
    change = do(Action.RESERVE, state(ALICE, BOB), order(ALICE, type=type))
    assert change.state.type == type
    assert change.state.holds(ALICE)
    assert change.state.holds(BOB) is (type in ALL_REGISTRANTS)
    assert not change.counts
    assert do(Action.RESERVE, change.state, order(ALICE, type=type)).state == change.state


@pytest.mark.parametrize(
    ("before", "wanted", "how"),
    [
        (state(BOB), order(ALICE, type=1), CONFLICT),
        (state(ALICE), order(ALICE, key=0xB, type=1), CONFLICT),
        (state(ALICE, BOB, type=Type.WRITE_EXCLUSIVE, holder=BOB), order(ALICE, type=1), CONFLICT),
        (state(ALICE, type=Type.WRITE_EXCLUSIVE), order(ALICE, type=3), CONFLICT),
        (state(ALICE), order(ALICE, type=2), Sense.INVALID_FIELD_IN_CDB),
        (state(ALICE), order(ALICE, type=0), Sense.INVALID_FIELD_IN_CDB),
        (state(ALICE), order(ALICE, type=1, scope=2), Sense.INVALID_FIELD_IN_CDB),
    ],
)
def test_reserve_is_refused(before: State, wanted: Order, how: object) -> None:
    refused(Action.RESERVE, before, wanted, how)


@pytest.mark.parametrize("type", TYPES)
def test_release_by_the_holder_tells_the_other_registrants_of_shared_types(type: Type) -> None:
    """§5.13.11.3."""
    change = do(Action.RELEASE, state(ALICE, BOB, type=type), order(ALICE, type=type))
    assert change.state.type == Type.NONE
    told = ((BOB, Sense.RESERVATIONS_RELEASED),) if type in SHARED else ()
    assert change.attentions == told
    assert not change.counts


def test_release_by_who_does_not_hold_does_nothing() -> None:
    before = state(ALICE, BOB, type=Type.WRITE_EXCLUSIVE)
    assert do(Action.RELEASE, before, order(BOB, type=1)).state == before
    assert do(Action.RELEASE, state(ALICE), order(ALICE, type=1)).state == state(ALICE)


@pytest.mark.parametrize(("type", "scope"), [(3, 0), (1, 1)])
def test_release_of_another_type_or_scope_is_an_error(type: int, scope: int) -> None:
    refused(
        Action.RELEASE,
        state(ALICE, type=Type.WRITE_EXCLUSIVE),
        order(ALICE, type=type, scope=scope),
        Sense.INVALID_RELEASE_OF_PERSISTENT_RESERVATION,
    )


def test_clear_ends_everything_and_tells_the_others() -> None:
    """§5.13.11.6."""
    change = do(Action.CLEAR, state(ALICE, BOB, CAROL, type=Type.EXCLUSIVE_ACCESS, holder=BOB), order(ALICE))
    assert change.state == State()
    assert set(change.attentions) == {
        (BOB, Sense.RESERVATIONS_PREEMPTED),
        (CAROL, Sense.RESERVATIONS_PREEMPTED),
    }


@pytest.mark.parametrize("action", [Action.RELEASE, Action.CLEAR, Action.PREEMPT, Action.REGISTER_AND_MOVE])
def test_only_registrants_with_their_key_may_act(action: Action) -> None:
    """Table 55."""
    before = state(ALICE, type=Type.WRITE_EXCLUSIVE)
    refused(action, before, order(BOB, sark=0xA, type=1, others=(CAROL,)), CONFLICT)
    refused(action, before, order(ALICE, key=0xB, sark=0xA, type=1, others=(CAROL,)), CONFLICT)


# -- PREEMPT (§5.13.11.4, figure 8) -------------------------------------------------------------------


@pytest.mark.parametrize("type", SINGLE + REGISTRANTS_ONLY)
def test_preempting_the_holders_key_takes_the_reservation(type: Type) -> None:
    before = state(ALICE, BOB, CAROL, type=type, holder=BOB)
    change = do(Action.PREEMPT, before, order(ALICE, sark=0xB, type=type))
    assert change.state.registrations == {ALICE: 0xA, CAROL: 0xC}
    assert change.state.holds(ALICE)
    assert change.state.type == type
    assert change.attentions == ((BOB, Sense.REGISTRATIONS_PREEMPTED),)
    assert change.abort == ()
    assert change.counts


def test_preempting_with_another_type_tells_the_registrants_that_remain() -> None:
    before = state(ALICE, BOB, CAROL, type=Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, holder=BOB)
    change = do(Action.PREEMPT, before, order(ALICE, sark=0xB, type=Type.EXCLUSIVE_ACCESS))
    assert set(change.attentions) == {
        (BOB, Sense.REGISTRATIONS_PREEMPTED),
        (CAROL, Sense.RESERVATIONS_RELEASED),
    }


@pytest.mark.parametrize("type", ALL_REGISTRANTS)
def test_key_0_preempts_every_other_registrant_of_an_all_registrants_type(type: Type) -> None:
    before = state(ALICE, BOB, CAROL, type=type)
    change = do(Action.PREEMPT, before, order(ALICE, sark=0, type=Type.EXCLUSIVE_ACCESS))
    assert change.state == state(ALICE, type=Type.EXCLUSIVE_ACCESS)
    assert {sense for _, sense in change.attentions} == {Sense.REGISTRATIONS_PREEMPTED}


@pytest.mark.parametrize("type", [Type.NONE, *TYPES])
def test_preempting_another_key_removes_registrations_and_leaves_the_reservation(type: Type) -> None:
    before = state(ALICE, BOB, CAROL, type=type)
    change = do(Action.PREEMPT, before, order(ALICE, sark=0xC))
    assert change.state.registrations == {ALICE: 0xA, BOB: 0xB}
    assert change.state.type == type
    assert change.attentions == ((CAROL, Sense.REGISTRATIONS_PREEMPTED),)


def test_a_preempted_key_takes_all_nexuses_that_share_it() -> None:
    before = replace(state(ALICE, BOB, CAROL), registrations={ALICE: 1, BOB: 2, CAROL: 2})
    before = before.reserved(Type.WRITE_EXCLUSIVE, BOB)
    change = do(Action.PREEMPT_AND_ABORT, before, order(ALICE, key=1, sark=2, type=1))
    assert change.state.registrations == {ALICE: 1}
    assert set(change.abort) == {BOB, CAROL}


def test_a_holder_may_change_the_type_by_preempting_itself() -> None:
    before = state(ALICE, BOB, type=Type.WRITE_EXCLUSIVE)
    change = do(Action.PREEMPT, before, order(ALICE, sark=0xA, type=Type.EXCLUSIVE_ACCESS))
    assert change.state.registrations == {ALICE: 0xA, BOB: 0xB}
    assert change.state.type == Type.EXCLUSIVE_ACCESS
    assert change.attentions == ((BOB, Sense.RESERVATIONS_RELEASED),)


@pytest.mark.parametrize(
    ("before", "wanted", "how"),
    [
        (state(ALICE, BOB), order(ALICE, sark=0xF), CONFLICT),
        (state(ALICE, BOB), order(ALICE, sark=0), INVALID_FIELD),
        (state(ALICE, BOB, type=Type.WRITE_EXCLUSIVE), order(ALICE, sark=0), INVALID_FIELD),
        (
            state(ALICE, BOB, type=Type.WRITE_EXCLUSIVE, holder=BOB),
            order(ALICE, sark=0xB, type=4),
            Sense.INVALID_FIELD_IN_CDB,
        ),
    ],
)
def test_preempt_is_refused(before: State, wanted: Order, how: object) -> None:
    refused(Action.PREEMPT, before, wanted, how)


# -- REGISTER AND MOVE (§5.13.8) ----------------------------------------------------------------------


@pytest.mark.parametrize("type", SINGLE + REGISTRANTS_ONLY)
@pytest.mark.parametrize("unregister", [False, True])
def test_register_and_move_makes_another_nexus_the_holder(type: Type, unregister: bool) -> None:
    before = state(ALICE, type=type)
    wanted = order(ALICE, sark=0xD, others=(BOB,), flags=0x02 if unregister else 0)
    change = do(Action.REGISTER_AND_MOVE, before, wanted)
    assert change.state.registrations == ({BOB: 0xD} if unregister else {ALICE: 0xA, BOB: 0xD})
    assert change.state.holder == BOB
    assert change.state.type == type
    assert change.attentions == ()


@pytest.mark.parametrize(
    ("before", "wanted", "how"),
    [
        (state(ALICE), order(ALICE, sark=1, others=(BOB,)), CONFLICT),
        (
            state(ALICE, BOB, type=Type.WRITE_EXCLUSIVE, holder=BOB),
            order(ALICE, sark=1, others=(BOB,)),
            CONFLICT,
        ),
        (state(ALICE, type=ALL_REGISTRANTS[0]), order(ALICE, sark=1, others=(BOB,)), CONFLICT),
        (state(ALICE, type=Type.WRITE_EXCLUSIVE), order(ALICE, sark=0, others=(BOB,)), INVALID_FIELD),
        (state(ALICE, type=Type.WRITE_EXCLUSIVE), order(ALICE, sark=1, others=(ALICE,)), INVALID_FIELD),
    ],
)
def test_register_and_move_is_refused(before: State, wanted: Order, how: object) -> None:
    refused(Action.REGISTER_AND_MOVE, before, wanted, how)


# -- what is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [Type.NONE, *TYPES])
def test_a_state_with_aptpl_comes_back_as_it_was(type: Type) -> None:
    """§5.13.5."""
    before = replace(state(ALICE, BOB, type=type), aptpl=True)
    assert State.restore(before.export()) == before
    assert list(State.restore(before.export()).registrations) == [ALICE, BOB]


def test_without_aptpl_nothing_is_kept() -> None:
    assert state(ALICE, type=Type.WRITE_EXCLUSIVE).export() == b""
    assert State.restore(b"") == State()


@pytest.mark.parametrize(
    "stored",
    [b"{", b"[]", b"null", b'{"version": 2}', b'{"version": 1}', b"\xff", b'{"version": 1, "type": 9}'],
)
def test_a_state_that_cannot_be_read_is_an_error_not_an_open_door(stored: bytes) -> None:
    with pytest.raises(ValueError, match="stored reservations"):
        State.restore(stored)


# -- whose a registration is ------------------------------------------------------------------------


def nexus_of(user: str, group: int = 1) -> Nexus:
    """Always of the same initiator port."""
    return Nexus("iqn.a", bytes.fromhex("000000000001"), "iqn.t", group, user)


def registered_by(user: str, before: State | None = None, key: int = 0xA) -> State:
    before = before or State()
    nexus = nexus_of(user)
    own = before.ports_of(nexus)
    wanted = Order(own, 0, 0, 0, key, 0, (own,), user)
    return do(Action.REGISTER_AND_IGNORE_EXISTING_KEY, before, wanted).state


@pytest.mark.parametrize(
    ("owner", "other", "same"),
    [
        ("alice", "alice", True),
        ("alice", "bob", False),
        ("alice", "", False),
        ("", "alice", True),  # registered before CHAP was asked for
        ("", "", True),
    ],
)
def test_a_registration_is_not_inherited_by_another_user_of_the_same_name(
    owner: str, other: str, same: bool
) -> None:
    before = registered_by(owner).reserved(Type.EXCLUSIVE_ACCESS, ALICE)
    assert before.ports_of(nexus_of(owner)) == ALICE
    assert before.excludes(before.ports_of(nexus_of(other))) is not same
    again = State.restore(replace(before, aptpl=True).export())
    assert again.excludes(again.ports_of(nexus_of(other))) is not same


def test_two_users_of_one_name_register_side_by_side_and_keep_what_is_theirs() -> None:
    both = registered_by("bob", registered_by("alice"), key=0xB)
    alice, bob = both.ports_of(nexus_of("alice")), both.ports_of(nexus_of("bob"))
    assert (both.registrations[alice], both.registrations[bob]) == (0xA, 0xB)
    alone = both.without((alice,))
    assert alone.ports_of(nexus_of("bob")) == bob  # although the plain name is free now
    assert alone.registrations == {bob: 0xB}
    assert transport_id(bob[0]) == transport_id(alice[0])


def test_a_name_that_is_registered_anew_is_the_new_owners() -> None:
    cleared = do(Action.CLEAR, registered_by("alice"), order(ALICE)).state
    bobs = registered_by("bob", cleared)
    assert bobs.users == {ALICE: "bob"}
    assert bobs.ports_of(nexus_of("alice")) != ALICE


def test_what_others_register_by_transport_id_is_for_whoever_has_the_name() -> None:
    cleared = do(Action.CLEAR, registered_by("alice"), order(ALICE)).state
    made = do(Action.REGISTER, cleared, order(BOB, 0, 0xB, flags=SPEC_I_PT, others=(ALICE,))).state
    assert made.ports_of(nexus_of("carol")) == ALICE
