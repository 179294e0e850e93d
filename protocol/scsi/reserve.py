"""Bodies of PERSISTENT RESERVE IN and OUT, and of RESERVE and RELEASE: parameter lists and what is reported.

What comes of them is the business of ``reservations.py``.

Source: SPC-4 r37 §5.13, §6.15, §6.16; SPC-2 r20 §5.5 for RESERVE and RELEASE.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from protocol.scsi.registrations import (
    ACTIONS,
    ALL_TG_PT,
    APTPL,
    FLAGS_AT,
    MAXIMUM_REGISTRATIONS,
    MOVE_FLAGS_AT,
    SHARED_TYPES,
    SPEC_I_PT,
    Action,
    Order,
    Ports,
    Type,
    in_parameters,
)
from protocol.scsi.request import GOOD, Nexus, Outcome, Request
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense
from protocol.scsi.transportid import initiator_ports, transport_id

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "persistent_reserve_in",
    "persistent_reserve_out",
    "prepare_persistent_reserve_out",
    "release",
    "reserve",
]

MAXIMUM_PARAMETER_BYTES = 64 * 1024
"""PERSISTENT RESERVE OUT: room for a TransportID of each registration there may be, near enough."""


def _of(unit: "LogicalUnit") -> Reservations:
    reservations = unit.reservations
    assert isinstance(reservations, Reservations)
    reservations.units.add(unit)
    return reservations


# -- PERSISTENT RESERVE OUT (SPC-4 §6.16) -------------------------------------------------------------

_BASIC_BYTES = 24


def prepare_persistent_reserve_out(unit: "LogicalUnit", request: Request) -> None:
    """PARAMETER LIST LENGTH: 24, or more with TransportIDs."""
    length = int.from_bytes(request.cdb[5:9], "big")
    if not _BASIC_BYTES <= length <= MAXIMUM_PARAMETER_BYTES:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR, field=5)
    request.transfer_length = length


def persistent_reserve_out(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """PERSISTENT RESERVE OUT, every service action; None: it is being kept, GOOD follows."""
    reservations = _of(unit)
    action = Action(request.cdb[1] & 0x1F)
    data = bytes(request.data_out[: request.transfer_length])  # it may be borrowed, and not our turn yet

    def step() -> Outcome | None:
        order = _decode(unit, request, action, data)
        return reservations.change(unit, request, ACTIONS[action](reservations.state, order))

    return reservations.in_turn(unit, request, step)


def _decode(unit: "LogicalUnit", request: Request, action: Action, data: bytes) -> Order:
    cdb, nexus = request.cdb, request.nexus
    length = request.transfer_length
    if len(data) < length:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    state = _of(unit).state
    ports = state.ports_of(nexus)
    own: tuple[Ports, ...] = (ports,)
    others: tuple[Ports, ...] = ()
    if action is Action.REGISTER_AND_MOVE:
        flags = data[MOVE_FLAGS_AT]
        others = _destination(unit, nexus, data)
    else:
        flags = data[FLAGS_AT]
        registers = action in (Action.REGISTER, Action.REGISTER_AND_IGNORE_EXISTING_KEY)
        if registers and flags & ALL_TG_PT:
            own = tuple(state.ports_of(nexus, port) for port in _target_ports(unit, nexus))
        if flags & SPEC_I_PT:
            if action is not Action.REGISTER:
                raise in_parameters(FLAGS_AT, 3)
            others = _specified(unit, data, [port for _, port in own])
        elif length != _BASIC_BYTES:
            raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR, field=5)
        if not registers:
            flags &= ~APTPL
    if flags & APTPL and unit.keep is None:  # PTPL_C is 0
        raise in_parameters(MOVE_FLAGS_AT if action is Action.REGISTER_AND_MOVE else FLAGS_AT, 0)
    return Order(
        ports=ports,
        type=cdb[2] & 0x0F,
        scope=cdb[2] >> 4,
        key=int.from_bytes(data[0:8], "big"),
        service_action_key=int.from_bytes(data[8:16], "big"),
        flags=flags,
        own=own,
        user=nexus.user,
        others=others,
    )


def _target_port(nexus: Nexus, group: int) -> str:
    return f"{nexus.target_name},t,0x{group:04x}"


def _target_ports(unit: "LogicalUnit", nexus: Nexus) -> list[str]:
    """The target ports of the nexus's SCSI device, which is its iSCSI target (RFC 7143 §4.4.2)."""
    ask = _of(unit).target_port_groups
    if ask is not None:
        groups = {*ask(nexus), nexus.relative_target_port}
    else:
        groups = {
            other.relative_target_port for other in unit.nexuses if other.target_name == nexus.target_name
        }
        groups.add(nexus.relative_target_port)
    return [_target_port(nexus, group) for group in sorted(groups)]


def _specified(unit: "LogicalUnit", data: bytes, target_ports: list[str]) -> tuple[Ports, ...]:
    """SPEC_I_PT: the nexuses of the TransportIDs with these target ports (SPC-4 §6.16.3)."""
    if len(data) < _BASIC_BYTES + 4:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    length = int.from_bytes(data[24:28], "big")
    if length != len(data) - 28:
        raise in_parameters(24)
    others: list[Ports] = []
    at = 28
    while at < len(data):
        initiators, size = initiator_ports(data, at, unit.nexuses)
        others += [(initiator, target) for initiator in initiators for target in target_ports]
        at += size
        if len(others) > MAXIMUM_REGISTRATIONS:
            raise CheckCondition(Sense.INSUFFICIENT_REGISTRATION_RESOURCES)
    return tuple(others)


def _destination(unit: "LogicalUnit", nexus: Nexus, data: bytes) -> tuple[Ports, ...]:
    """REGISTER AND MOVE: RELATIVE TARGET PORT IDENTIFIER and one TransportID (SPC-4 §6.16.4)."""
    if int.from_bytes(data[20:24], "big") != len(data) - 24:
        raise in_parameters(20)
    target_port = _target_port(nexus, int.from_bytes(data[18:20], "big"))
    if target_port not in _target_ports(unit, nexus):
        raise in_parameters(18)
    initiators, size = initiator_ports(data, 24, unit.nexuses)
    if len(initiators) != 1 or size != len(data) - 24:
        raise in_parameters(24)
    return ((initiators[0], target_port),)


# -- PERSISTENT RESERVE IN (SPC-4 §6.15) --------------------------------------------------------------


def persistent_reserve_in(unit: "LogicalUnit", request: Request) -> Outcome:
    """PERSISTENT RESERVE IN; its lengths are those of the whole, whatever is cut off."""
    data = _REPORTS[request.cdb[1] & 0x1F](unit, _of(unit))
    return Outcome(data_in=data[: int.from_bytes(request.cdb[7:9], "big")])


def _header(reservations: Reservations, body: bytes) -> bytes:
    return reservations.generation.to_bytes(4, "big") + len(body).to_bytes(4, "big") + body


def _read_keys(unit: "LogicalUnit", reservations: Reservations) -> bytes:
    keys = reservations.state.registrations.values()
    return _header(reservations, b"".join(key.to_bytes(8, "big") for key in keys))


def _read_reservation(unit: "LogicalUnit", reservations: Reservations) -> bytes:
    """With an all registrants type the key is 0 (SPC-4 §6.15.3.2)."""
    state = reservations.state
    if state.type == Type.NONE:
        return _header(reservations, b"")
    key = state.registrations[state.holder] if state.holder is not None else 0
    return _header(reservations, key.to_bytes(8, "big") + bytes(5) + bytes((state.type, 0, 0)))


_CRH, _SIP_C, _ATP_C, _PTPL_C = 0x10, 0x08, 0x04, 0x01
_TMV, _PTPL_A = 0x80, 0x01
_TYPE_MASK = {
    Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS: 0x8000,
    Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY: 0x4000,
    Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY: 0x2000,
    Type.EXCLUSIVE_ACCESS: 0x0800,
    Type.WRITE_EXCLUSIVE: 0x0200,
    Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS: 0x0001,
}


def _report_capabilities(unit: "LogicalUnit", reservations: Reservations) -> bytes:
    """ALLOW COMMANDS is 0: nothing is said about it."""
    able = _CRH | _SIP_C | _ATP_C | (_PTPL_C if unit.keep is not None else 0)
    active = _TMV | (_PTPL_A if reservations.state.aptpl else 0)
    return bytes((0, 8, able, active)) + sum(_TYPE_MASK.values()).to_bytes(2, "big") + bytes(2)


def _read_full_status(unit: "LogicalUnit", reservations: Reservations) -> bytes:
    """One descriptor a registration (SPC-4 table 218). ALL_TG_PT is 0: each target port has its own."""
    state = reservations.state
    descriptors = bytearray()
    for ports, key in state.registrations.items():
        holds = state.holds(ports)
        initiator = transport_id(ports[0])
        descriptors += key.to_bytes(8, "big") + bytes(4)
        descriptors += bytes((holds, state.type if holds else 0)) + bytes(4)
        descriptors += int(ports[1].rpartition(",t,0x")[2], 16).to_bytes(2, "big")
        descriptors += len(initiator).to_bytes(4, "big") + initiator
    return _header(reservations, bytes(descriptors))


_REPORTS: Mapping[int, Callable[["LogicalUnit", Reservations], bytes]] = {
    0: _read_keys,
    1: _read_reservation,
    2: _report_capabilities,
    3: _read_full_status,
}


# -- RESERVE and RELEASE, (6) and (10) (SPC-2 §7.21, §7.22; SPC-4 §5.13.3) -----------------------------


def _compatible(reservations: Reservations, nexus: Nexus) -> bool:
    """CRH: who has access by a persistent reservation may RESERVE and RELEASE without effect (SPC-4 §5.13.3).

    Raises ``ReservationConflict`` where registrations rule the old commands out.
    """
    state = reservations.state
    ports = state.ports_of(nexus)
    if state.holds(ports) or (state.type in SHARED_TYPES and ports in state.registrations):
        return True
    if state.registrations:
        raise ReservationConflict
    return False


def reserve(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """RESERVE(6) and (10), of the whole unit."""
    reservations, nexus = _of(unit), request.nexus

    def step() -> Outcome:
        if not _compatible(reservations, nexus) and nexus in unit.nexuses:
            if reservations.reserved_by not in (None, nexus):
                raise ReservationConflict
            reservations.reserve(nexus)
        return GOOD

    return reservations.in_turn(unit, request, step)


def release(unit: "LogicalUnit", request: Request) -> Outcome:
    """RELEASE(6) and (10): of another's reservation, or of none, it is GOOD and does nothing."""
    reservations, nexus = _of(unit), request.nexus
    if not _compatible(reservations, nexus):
        reservations.nexus_lost(nexus)
    return GOOD
