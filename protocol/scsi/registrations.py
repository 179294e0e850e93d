"""Registrations and persistent reservations as data, and what each service action makes of them.

What a PERSISTENT RESERVE OUT does is a pure function from a ``State`` and an ``Order`` (the command, decoded)
to a ``Change``: the new state, the unit attentions it causes and whose tasks it ends. Nothing here knows a
logical unit, a session or a store.

Registrations belong to I_T nexuses by name, (initiator port, target port), so they outlive sessions. The
name of an initiator port is only claimed; where CHAP has proven the user behind it, the registration is that
user's (``State.users``), and another user's nexus of the same name is another nexus (``State.ports_of``).

Source: SPC-4 r37 §5.13, §6.16.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial

from protocol.scsi.request import Nexus
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense

__all__ = [
    "ACTIONS",
    "ALL_TG_PT",
    "APTPL",
    "EXCLUSIVE_ACCESS_TYPES",
    "FLAGS_AT",
    "MAXIMUM_REGISTRATIONS",
    "MOVE_FLAGS_AT",
    "SHARED_TYPES",
    "SPEC_I_PT",
    "Action",
    "Change",
    "Order",
    "Ports",
    "State",
    "Type",
    "in_parameters",
]

MAXIMUM_REGISTRATIONS = 1024
"""Per logical unit. A cluster of 64 nodes with 8 paths each has 512."""

Ports = tuple[str, str]
"""An I_T nexus by name: (initiator port, target port). Behind a NUL in the first stands the user, of a nexus
whose name is registered for another one."""


class Type(IntEnum):
    """Persistent reservation types (SPC-4 table 58)."""

    NONE = 0
    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8


_ALL_REGISTRANTS = frozenset((Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS, Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS))
SHARED_TYPES = _ALL_REGISTRANTS | {
    Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY,
}
"""Types under which every registered nexus has access."""
EXCLUSIVE_ACCESS_TYPES = frozenset(
    (
        Type.EXCLUSIVE_ACCESS,
        Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY,
        Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
    )
)


class Action(IntEnum):
    """Service actions of PERSISTENT RESERVE OUT (SPC-4 table 222)."""

    REGISTER = 0
    RESERVE = 1
    RELEASE = 2
    CLEAR = 3
    PREEMPT = 4
    PREEMPT_AND_ABORT = 5
    REGISTER_AND_IGNORE_EXISTING_KEY = 6
    REGISTER_AND_MOVE = 7


# -- the state --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """Registrations and the persistent reservation at one moment."""

    registrations: Mapping[Ports, int] = field(default_factory=dict)
    """Reservation key by I_T nexus, in order of registration."""
    type: Type = Type.NONE
    holder: Ports | None = None
    """None also for the all registrants types: there every registered nexus is a holder."""
    aptpl: bool = False
    """Activate Persist Through Power Loss."""
    users: Mapping[Ports, str] = field(default_factory=dict)
    """I_T nexus → the CHAP user who registered it. Absent: nobody was asked for a proof, or others
    registered it by its TransportID; it is then whoever's that has the name."""

    def ports_of(self, nexus: Nexus, target_port: str | None = None) -> Ports:
        """What a nexus is registered as, or would be; through another target port, if that is given."""
        target_port = target_port or nexus.target_port
        plain = nexus.initiator_port, target_port
        apart = f"{nexus.initiator_port}\0{nexus.user}", target_port
        if apart in self.registrations:
            return apart
        taken = plain in self.registrations and self.users.get(plain, nexus.user) != nexus.user
        return apart if taken else plain

    def registered(self, registrations: Mapping[Ports, int], own: Collection[Ports], user: str) -> "State":
        """With these registrations, those of ``own`` being the user's."""
        users = {ports: name for ports, name in self.users.items() if ports in self.registrations}
        if user:
            users |= dict.fromkeys(own, user)
        users = {ports: name for ports, name in users.items() if ports in registrations}
        return replace(self, registrations=registrations, users=users)

    def holds(self, ports: Ports) -> bool:
        """Is this nexus a persistent reservation holder?"""
        if self.type in _ALL_REGISTRANTS:
            return ports in self.registrations
        return self.type != Type.NONE and ports == self.holder

    def excludes(self, ports: Ports) -> bool:
        """Is this nexus one that the reservation is held against?"""
        if self.type == Type.NONE or ports == self.holder:
            return False
        return self.type not in SHARED_TYPES or ports not in self.registrations

    def reserved(self, kind: Type, ports: Ports) -> "State":
        """With a reservation of that type for that nexus."""
        return replace(self, type=kind, holder=None if kind in _ALL_REGISTRANTS else ports)

    def released(self) -> "State":
        """Without a reservation."""
        return replace(self, type=Type.NONE, holder=None)

    def without(self, gone: Collection[Ports]) -> "State":
        """Without these registrations; a reservation nobody holds any more is released (§5.13.11.1)."""
        kept = {ports: key for ports, key in self.registrations.items() if ports not in gone}
        state = replace(self, registrations=kept)
        alive = bool(kept) if self.type in _ALL_REGISTRANTS else self.holder in kept
        return state if alive else state.released()

    def with_names(self, names: Mapping[str, str]) -> "State":
        """With other target names, by old ones: registrations are of the ports, whatever they are called."""

        def renamed(ports: Ports) -> Ports:
            name, separator, tag = ports[1].rpartition(",t,")
            return ports[0], names.get(name, name) + separator + tag

        return replace(
            self,
            registrations={renamed(ports): key for ports, key in self.registrations.items()},
            holder=renamed(self.holder) if self.holder is not None else None,
        )

    def export(self) -> bytes:
        """For ``restore`` after a power loss; nothing without APTPL."""
        if not self.aptpl:
            return b""
        return json.dumps(
            {
                "version": 1,
                "type": int(self.type),
                "holder": self.holder,
                "registrations": [[*ports, key] for ports, key in self.registrations.items()],
                "users": [[*ports, self.users[ports]] for ports in self.registrations if ports in self.users],
            }
        ).encode()

    @classmethod
    def restore(cls, stored: bytes) -> "State":
        """What ``export`` gave.

        Raises:
            ValueError: it is not that. To start without the reservation would be to let in whom it fenced.
        """
        if not stored:
            return cls()
        try:
            data = json.loads(stored)
            if data["version"] != 1:
                raise ValueError(f"version {data['version']} is not known")
            registrations = {(str(i), str(t)): int(key) for i, t, key in data["registrations"]}
            users = {(str(i), str(t)): str(user) for i, t, user in data.get("users", ())}
            holder = data["holder"]
            return cls(
                registrations,
                Type(data["type"]),
                (str(holder[0]), str(holder[1])) if holder else None,
                True,
                users,
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the stored reservations cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Change:
    """What a PERSISTENT RESERVE OUT brings about."""

    state: State
    attentions: tuple[tuple[Ports, Sense], ...] = ()
    """Never for the nexus that sent the command."""
    abort: tuple[Ports, ...] = ()
    """Nexuses whose tasks end."""
    counts: bool = True
    """PRGENERATION counts it (SPC-4 §6.15.2)."""


@dataclass(frozen=True, slots=True)
class Order:
    """A PERSISTENT RESERVE OUT, decoded: its CDB and its parameter list (SPC-4 §6.16.3)."""

    ports: Ports
    type: int
    scope: int
    key: int
    service_action_key: int
    flags: int
    own: tuple[Ports, ...]
    """The nexuses that a REGISTER is for: the sender's own, through all target ports with ALL_TG_PT."""
    user: str = ""
    """The sender's, by CHAP."""
    others: tuple[Ports, ...] = ()
    """SPEC_I_PT: the nexuses to register besides; REGISTER AND MOVE: the one to move to."""


APTPL, ALL_TG_PT, SPEC_I_PT = 0x01, 0x04, 0x08
UNREG = 0x02
SA_KEY_AT, FLAGS_AT, MOVE_FLAGS_AT = 8, 20, 17


def in_parameters(byte: int, bit: int | None = None) -> CheckCondition:
    """INVALID FIELD IN PARAMETER LIST that points there."""
    return CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=byte, bit=bit, in_parameters=True)


def _wanted_type(order: Order) -> Type:
    """SCOPE and TYPE of the CDB, where they count."""
    if order.scope:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=7)
    if order.type not in _TYPES:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=3)
    return Type(order.type)


_TYPES = frozenset(Type) - {Type.NONE}


def _authorised(state: State, order: Order) -> None:
    """The sender is registered with the key it gives, or RESERVATION CONFLICT (SPC-4 table 55)."""
    if state.registrations.get(order.ports) != order.key:
        raise ReservationConflict


# -- the service actions ----------------------------------------------------------------------------


def _register(state: State, order: Order) -> Change:
    """REGISTER (SPC-4 table 59)."""
    known = state.registrations.get(order.ports)
    if order.key != (known or 0):
        raise ReservationConflict
    if known is not None and order.flags & SPEC_I_PT:
        raise in_parameters(FLAGS_AT, 3)
    return _set_registration(state, order)


def _register_and_ignore(state: State, order: Order) -> Change:
    """REGISTER AND IGNORE EXISTING KEY (SPC-4 table 60)."""
    if order.flags & SPEC_I_PT:
        raise in_parameters(FLAGS_AT, 3)
    return _set_registration(state, order)


def _set_registration(state: State, order: Order) -> Change:
    if not order.service_action_key:
        if order.ports not in state.registrations:
            return Change(state)  # "do nothing except return GOOD status"
        return _unregister(replace(state, aptpl=bool(order.flags & APTPL)), order)
    state = replace(state, aptpl=bool(order.flags & APTPL))
    registrations = dict(state.registrations)
    for ports in order.own:
        registrations[ports] = order.service_action_key
    for ports in order.others:
        registrations.setdefault(ports, order.service_action_key)
    if len(registrations) > MAXIMUM_REGISTRATIONS:
        raise CheckCondition(Sense.INSUFFICIENT_REGISTRATION_RESOURCES)
    return Change(state.registered(registrations, order.own, order.user))


def _unregister(state: State, order: Order) -> Change:
    """Key 0 ends the registration (SPC-4 §5.13.11.2); a reservation that ends with it may concern others."""
    after = state.without(order.own)
    if state.type in SHARED_TYPES and after.type == Type.NONE:
        return Change(after, _tell(after.registrations, order, Sense.RESERVATIONS_RELEASED))
    return Change(after)


def _tell(whom: Collection[Ports], order: Order, sense: Sense) -> tuple[tuple[Ports, Sense], ...]:
    return tuple((ports, sense) for ports in whom if ports != order.ports)


def _reserve(state: State, order: Order) -> Change:
    """RESERVE (SPC-4 §5.13.9): the same again is GOOD, any other while there is one conflicts."""
    _authorised(state, order)
    kind = _wanted_type(order)
    if state.type == Type.NONE:
        return Change(state.reserved(kind, order.ports), counts=False)
    if not state.holds(order.ports) or state.type != kind:
        raise ReservationConflict
    return Change(state, counts=False)


def _release(state: State, order: Order) -> Change:
    """RELEASE (SPC-4 §5.13.11.3): by who holds none it is GOOD and does nothing."""
    _authorised(state, order)
    if not state.holds(order.ports):
        return Change(state, counts=False)
    if order.scope or order.type != state.type:
        raise CheckCondition(Sense.INVALID_RELEASE_OF_PERSISTENT_RESERVATION)
    shared = state.registrations if state.type in SHARED_TYPES else ()
    return Change(state.released(), _tell(shared, order, Sense.RESERVATIONS_RELEASED), counts=False)


def _clear(state: State, order: Order) -> Change:
    """CLEAR (SPC-4 §5.13.11.6)."""
    _authorised(state, order)
    told = _tell(state.registrations, order, Sense.RESERVATIONS_PREEMPTED)
    return Change(replace(state.released(), registrations={}), told)


def _preempt(state: State, order: Order, *, abort: bool = False) -> Change:
    """PREEMPT and PREEMPT AND ABORT (SPC-4 §5.13.11.4, §5.13.11.5, figure 8).

    With the key of the holder, or 0 against an all registrants type, the reservation changes hands; with
    another key only its registrations go.
    """
    _authorised(state, order)
    victim_key = order.service_action_key
    registrations = state.registrations
    everybody = state.type in _ALL_REGISTRANTS and not victim_key
    if not victim_key and not everybody:
        raise in_parameters(SA_KEY_AT)
    victims = [ports for ports, key in registrations.items() if everybody or key == victim_key]
    holder_key = registrations.get(state.holder) if state.holder is not None else None
    if everybody or holder_key == victim_key:
        kind = _wanted_type(order)
        gone = [ports for ports in victims if ports != order.ports]
        rest = {ports: key for ports, key in registrations.items() if ports not in gone}
        after = replace(state, registrations=rest).reserved(kind, order.ports)
        told = _tell(gone, order, Sense.REGISTRATIONS_PREEMPTED)
        if kind != state.type:
            told += _tell(rest, order, Sense.RESERVATIONS_RELEASED)
    elif victims:
        after = state.without(victims)
        told = _tell(victims, order, Sense.REGISTRATIONS_PREEMPTED)
        if after.type != state.type:
            told += _tell(after.registrations, order, Sense.RESERVATIONS_RELEASED)
    else:
        raise ReservationConflict
    return Change(after, told, tuple(victims) if abort else ())


def _register_and_move(state: State, order: Order) -> Change:
    """REGISTER AND MOVE (SPC-4 §5.13.8): another nexus becomes registered and the holder."""
    _authorised(state, order)
    if not state.holds(order.ports) or state.type in _ALL_REGISTRANTS:
        raise ReservationConflict
    if not order.service_action_key:
        raise in_parameters(SA_KEY_AT)
    (destination,) = order.others
    if destination == order.ports:
        raise in_parameters(24)
    registrations = dict(state.registrations)
    registrations[destination] = order.service_action_key
    if order.flags & UNREG:
        del registrations[order.ports]
    if len(registrations) > MAXIMUM_REGISTRATIONS:
        raise CheckCondition(Sense.INSUFFICIENT_REGISTRATION_RESOURCES)
    moved = replace(state.registered(registrations, (), ""), aptpl=bool(order.flags & APTPL))
    return Change(moved.reserved(state.type, destination))


ACTIONS: Mapping[Action, Callable[[State, Order], Change]] = {
    Action.REGISTER: _register,
    Action.RESERVE: _reserve,
    Action.RELEASE: _release,
    Action.CLEAR: _clear,
    Action.PREEMPT: _preempt,
    Action.PREEMPT_AND_ABORT: partial(_preempt, abort=True),
    Action.REGISTER_AND_IGNORE_EXISTING_KEY: _register_and_ignore,
    Action.REGISTER_AND_MOVE: _register_and_move,
}
