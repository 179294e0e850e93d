"""What the engine tells of itself: statuses, figures and explanations, made from what is live.

``Runtime`` gathers what each of these is asked about, and nothing changes by it; the shapes are those of
``targetd.interface``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from protocol.connection import Connection
from protocol.scsi import sanitize
from protocol.scsi.copymanager import results_of
from protocol.scsi.device import LogicalUnit
from protocol.scsi.device import Target as ScsiTarget
from protocol.session import Session
from targetd.config import Configuration, Portal, Target, full_name, mappings_by_target, split_address
from targetd.engine.extents import LiveExtent
from targetd.interface import (
    ConnectionStatus,
    Explanation,
    Latency,
    LunStatus,
    SessionStatus,
    UnitStatistics,
    VisibleLun,
    Work,
)
from targetd.net.access import AccessSnapshot, PortalAuthorizer, credentials_of
from targetd.net.counters import command_name, status_name

__all__ = ["explanation", "lun_statuses", "session_status", "unit_statistics", "work_under_way"]


def explanation(
    view: AccessSnapshot, portal: Portal, target: Target, initiator_name: str, address: str, obstacle: str
) -> Explanation:
    """What the login itself would answer, asked of the very code that answers it.

    Args:
        address: of the initiator.
        obstacle: why nobody comes in through the portal, whoever it is; empty: nothing stands in the way.
    """
    config = view.configuration
    local_host, local_port = split_address(portal.addresses[0]) if portal.addresses else (address, 0)
    authorizer = PortalAuthorizer(lambda: view, portal.id, address, local_host, local_port)
    name = full_name(config.globals, target)
    verdict = authorizer.judge(target, initiator_name)
    allowed, rule = verdict.group is not None, verdict.rule
    method = verdict.group.auth_method if verdict.group is not None else ""
    if verdict.group is not None and method.startswith("CHAP"):
        tag = verdict.group.auth_group
        if not credentials_of(config, verdict.group.auth_method, tag):
            allowed = False
            rule += f", but {method} is asked for and credential group {tag} has no user"
    moved = authorizer.moved(target)
    if allowed and moved is not None:
        allowed, rule = False, f"{rule}, but {moved.reason}"
    if obstacle:
        allowed, rule = False, f"{rule}, but {obstacle}"
    return Explanation(
        portal_id=portal.id,
        portal_addresses=portal.addresses,
        target_id=target.id,
        target_name=name,
        allowed=allowed,
        reason=rule,
        authentication=method if allowed else "",
        discovered=bool(authorizer.send_targets(initiator_name, name)),
        luns=tuple(_visible(view, target.id)) if allowed else (),
    )


def _visible(view: AccessSnapshot, target_id: int) -> Iterator[VisibleLun]:
    config, live = view.configuration, view.handles[target_id]
    assert isinstance(live, ScsiTarget)
    for mapping in sorted(mappings_by_target(config).get(target_id, ()), key=lambda mapping: mapping.lun):
        unit = live.luns[mapping.lun]
        yield VisibleLun(
            lun=mapping.lun,
            extent_id=mapping.extent_id,
            extent=config.extents[mapping.extent_id].name,
            size_bytes=unit.blocks * unit.block_size,
            block_size=unit.block_size,
            read_only=unit.read_only,
            ready=unit.medium_present,
        )


def lun_statuses(config: Configuration, target_id: int, live: ScsiTarget) -> dict[int, LunStatus]:
    """LUN → it as the logical unit controller shows it."""
    found = {}
    for mapping in mappings_by_target(config).get(target_id, ()):
        unit = live.luns[mapping.lun]
        found[mapping.lun] = LunStatus(
            path=config.extents[mapping.extent_id].path,
            size_bytes=unit.blocks * unit.block_size,
            read_only=unit.read_only,
            removable=unit.config.removable,
            present=unit.medium_present,
            locked=bool(unit.prevented_by),
        )
    return found


def work_under_way(extents: Iterable[LiveExtent]) -> Iterator[Work]:
    """What logical units are at just now that takes its time."""
    for live in extents:
        units = list(live.units.values())
        for locked in {unit.locked for unit in units}:
            if isinstance(locked, sanitize.Operation) and not locked.plan.failed:
                kind = "format" if locked.formats else "sanitize"
                yield Work(kind, live.extent.id, live.extent.name, locked.done, locked.total)
        for unit in units:
            for copy in results_of(unit).under_way:
                yield Work("copy", live.extent.id, live.extent.name, copy.transferred, copy.total)


def unit_statistics(
    extents: Iterable[LiveExtent],
    targets: Iterable[ScsiTarget],
    latency_of: Callable[[LogicalUnit], Latency],
) -> Iterator[UnitStatistics]:
    """The figures of every logical unit."""
    places: dict[int, list[tuple[str, int]]] = {}
    for scsi in targets:
        for lun, unit in scsi.luns.items():
            places.setdefault(id(unit), []).append((scsi.name, lun))
    for live in extents:
        for unit in list(live.units.values()):  # others have a turn in between
            yield _unit_statistics(live, unit, tuple(places.get(id(unit), ())), latency_of(unit))


def _unit_statistics(
    live: LiveExtent, unit: LogicalUnit, luns: tuple[tuple[str, int], ...], latency: Latency
) -> UnitStatistics:
    commands: dict[str, int] = {}
    for opcode, count in enumerate(unit.commands):
        if count:
            name = command_name(opcode)
            commands[name] = commands.get(name, 0) + count
    failures: dict[tuple[str, str], int] = {}
    for (opcode, status), count in unit.failures.items():
        key = command_name(opcode), status_name(status)
        failures[key] = failures.get(key, 0) + count
    return UnitStatistics(
        extent_id=live.extent.id,
        extent=live.extent.name,
        luns=luns,
        commands=commands,
        failures=failures,
        reads=unit.reads,
        writes=unit.writes,
        bytes_read=unit.bytes_read,
        bytes_written=unit.bytes_written,
        read_errors=unit.read_errors,
        write_errors=unit.write_errors,
        in_flight=len(unit.tasks),
        queued=live.lane.depth,
        ready=unit.medium_present,
        latency=latency,
    )


def session_status(session: Session, targets: Mapping[int, int], now: float) -> SessionStatus:
    """A session as an operator sees it.

    Args:
        targets: ``id`` of the live target → id of the target.
        now: on the loop's clock.
    """
    connections: list[Connection] = list(session.connections.values())
    target = session.target
    negotiated = dict(session.keys.as_dict())
    for connection in connections[:1]:
        negotiated |= connection.keys.as_dict()
    last_heard = max((connection.last_heard for connection in connections), default=session.created_at)
    return SessionStatus(
        id=session.id,
        initiator_name=session.initiator_name,
        initiator_alias=session.initiator_alias,
        target_id=targets.get(id(target)) if target is not None else None,
        target_name=session.grant.target_name,
        target_portal_group_tag=session.grant.target_portal_group_tag,
        isid=f"0x{session.isid.hex()}",
        tsih=session.tsih,
        user=session.user,
        connections=tuple(
            ConnectionStatus(
                cid=cid,
                peer_address=connection.owner.peer,
                local_address=connection.owner.local,
                header_digest="CRC32C" if connection.keys.header_digest else "None",
                data_digest="CRC32C" if connection.keys.data_digest else "None",
            )
            for cid, connection in session.connections.items()
        ),
        negotiated=negotiated,
        luns=tuple(target.luns) if target is not None else (),
        commands=session.commands,
        bytes_read=session.bytes_read,
        bytes_written=session.bytes_written,
        age_s=now - session.created_at,
        idle_s=now - last_heard,
    )
