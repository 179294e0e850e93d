"""Which logical units of other targets a third-party copy may name (``protocol.scsi.copymanager``).

Whoever may not read or write a LUN by itself must not have it copied. So the initiator of a session may name
a LUN of another target in two cases:

* It has a session there. Names are only claimed, so that session must have the same name and the same proof:
  the same CHAP user with the same secret, or, where none was asked for, the same address.
* It would be let in there through the portal by which it has come here, from where it has come: without a
  proof, or with the one that it has given here (the same user with the same secret). Other portals do not
  count: whether it could reach them only the network knows.
"""

from collections.abc import Iterator, Mapping

from protocol.access import Grant
from protocol.enums import AuthMethod
from protocol.scsi.device import LogicalUnit
from protocol.scsi.device import Target as ScsiTarget
from protocol.scsi.request import Nexus
from protocol.session import Session, SessionTable
from targetd.config import Configuration, extents_by_naa, full_name, mappings_by_extent, split_address

__all__ = ["units_beyond"]


def units_beyond(
    config: Configuration, targets: Mapping[int, ScsiTarget], sessions: SessionTable, nexus: Nexus, naa: str
) -> Iterator[tuple[LogicalUnit, Nexus]]:
    """The units with an NAA in other targets than the nexus's that its initiator may use, each with the nexus
    whose rights count there: one that it has, else one as it would have.

    Args:
        targets: those of this process, by their ids.
    """
    session = sessions.of(nexus)
    if session is None:
        return
    for extent in extents_by_naa(config).get(naa.lower(), ()):
        for mapping in mappings_by_extent(config).get(extent.id, ()):
            target = targets.get(mapping.target_id)
            unit = target.luns.get(mapping.lun) if target is not None else None
            if target is None or unit is None or target is session.target:
                continue
            name = full_name(config.globals, config.targets[mapping.target_id])
            there = _session_there(sessions, target, session) or _would_be(name, session)
            if there is not None:
                yield unit, there


def _session_there(sessions: SessionTable, target: ScsiTarget, session: Session) -> Nexus | None:
    """A nexus of the same initiator with that target."""
    for nexus in target.nexuses:
        if nexus.initiator_name == session.initiator_name:
            other = sessions.of(nexus)
            if other is not None and _same_proof(other, session):
                return nexus
    return None


def _same_proof(there: Session, here: Session) -> bool:
    if there.user:
        return there.user == here.user and not _secrets(there).isdisjoint(_secrets(here))
    return not _hosts(there).isdisjoint(_hosts(here))


def _secrets(session: Session) -> set[bytes]:
    """What the session has proven to know; nothing where no proof was asked for."""
    credentials = session.grant.credentials if session.user else ()
    return {credential.secret for credential in credentials if credential.user == session.user}


def _hosts(session: Session) -> set[str]:
    """Where its connections come from."""
    return {split_address(connection.owner.peer)[0] for connection in session.connections.values()}


def _would_be(name: str, session: Session) -> Nexus | None:
    """The nexus that a login of this initiator with the target of that name would make; None: it would be
    refused."""
    for connection in session.connections.values():
        grant = connection.owner.authorizer().target(session.initiator_name, name)
        user = _admitted(session, grant) if isinstance(grant, Grant) else None
        if isinstance(grant, Grant) and user is not None:
            portal_id = grant.target_portal_group_tag
            return Nexus(session.initiator_name, session.isid, name, portal_id, user)
    return None


def _admitted(session: Session, grant: Grant) -> str | None:
    """As which user the grant lets the session in, by what that has proven; empty: without one; None: not."""
    secrets = _secrets(session)
    if any(each.user == session.user and each.secret in secrets for each in grant.credentials):
        return session.user
    return "" if grant.methods & AuthMethod.NONE else None
