"""What is registered with iSNS servers: a pure function of the configuration (RFC 4171 §5.6.5.1, §6).

The host is one entity, with the portals it listens on and its targets, each with the portal groups it is
granted through. Where discovery asks for a proof nobody is told of targets without one, and so not by an iSNS
server: such a portal is left out, and with it the targets that are granted through no other.
"""

import ipaddress
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from targetd.config import (
    Configuration,
    full_name,
    groups_by_target,
    is_wildcard,
    split_address,
    split_location,
)
from targetd.isns.messages import DELIMITER, Attribute, Tag, address, number, text

__all__ = ["PERIOD_S", "Registration", "registration"]

PERIOD_S = 900
"""A server may forget an entity that it has not heard of for so long (§6.2.6); as with FreeBSD's ctld."""
_ISCSI, _TARGET = 2, 1
"""Entity protocol (§6.2.2); bit of the node type (§6.4.2)."""

Place = tuple[str, int]
"""IP address, TCP port. A wildcard stands for the address that the server sees us at."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What is to be told of this host."""

    entity: str
    portals: tuple[Place, ...]
    targets: tuple[tuple[str, str, tuple[tuple[int, tuple[Place, ...]], ...]], ...]
    """(name, alias, ((portal group tag, its portals), …))"""
    hidden: int
    """Targets that are left out, since discovery asks for a proof wherever they are granted."""

    @property
    def source(self) -> Attribute:
        """Who speaks: an iSCSI name that is registered (§5.6.1)."""
        return text(Tag.ISCSI_NAME, self.targets[0][0])

    def register(self, seen_at: str) -> list[Attribute]:
        """The attributes of a DevAttrReg that replaces what was registered before.

        Args:
            seen_at: our address towards the server.
        """
        return [self.source, DELIMITER, *self._said(seen_at)]

    def query(self) -> list[Attribute]:
        """Of a DevAttrQry that asks whether the entity is there; it counts as a sign of life."""
        return [
            self.source,
            text(Tag.ENTITY_IDENTIFIER, self.entity),
            DELIMITER,
            Attribute(Tag.ENTITY_PROTOCOL),
        ]

    def deregister(self) -> list[Attribute]:
        """Of a DevDereg of the entity with all that belongs to it."""
        return [self.source, DELIMITER, text(Tag.ENTITY_IDENTIFIER, self.entity)]

    def _said(self, seen_at: str) -> Iterator[Attribute]:
        yield text(Tag.ENTITY_IDENTIFIER, self.entity)
        yield number(Tag.ENTITY_PROTOCOL, _ISCSI)
        yield number(Tag.REGISTRATION_PERIOD, PERIOD_S)
        for host, port in _real(self.portals, seen_at):
            yield address(Tag.PORTAL_ADDRESS, host)
            yield number(Tag.PORTAL_PORT, port)
        for name, alias, groups in self.targets:
            yield text(Tag.ISCSI_NAME, name)
            yield number(Tag.ISCSI_NODE_TYPE, _TARGET)
            if alias:
                yield text(Tag.ISCSI_ALIAS, alias)
            for tag, portals in groups:
                yield number(Tag.GROUP_TAG, tag)
                for host, port in _real(portals, seen_at):
                    yield address(Tag.GROUP_PORTAL_ADDRESS, host)
                    yield number(Tag.GROUP_PORTAL_PORT, port)


def _real(places: Collection[Place], seen_at: str) -> list[Place]:
    """The places. The wildcard of the server's family is the address it sees us at; that of the other family
    is left out."""
    found = []
    for host, port in places:
        if not is_wildcard(host):
            found.append((host, port))
        elif (":" in host) == (":" in seen_at):
            found.append((seen_at, port))
    return list(dict.fromkeys(found))


def registration(config: Configuration, absent: Collection[str], host_name: str) -> Registration | None:
    """What is to be registered; None: nothing.

    Args:
        absent: addresses of portals that are not listened on now.
    """
    if not config.service_enabled or not config.globals.isns_servers:
        return None
    places = {
        portal_id: found
        for portal_id in config.portals
        if _discovery_is_open(config, portal_id) and (found := _places(config, portal_id, absent))
    }
    targets, hidden = [], 0
    for target in config.targets.values():
        grants = groups_by_target(config).get(target.id, ())
        groups = {grant.portal_id: places[grant.portal_id] for grant in grants if grant.portal_id in places}
        if groups:
            targets.append((full_name(config.globals, target), target.alias or "", tuple(groups.items())))
        elif grants:
            hidden += 1
    if not targets:
        return None
    used = dict.fromkeys(place for _, _, groups in targets for _, found in groups for place in found)
    return Registration(f"{host_name}:{config.globals.basename}", tuple(used), tuple(targets), hidden)


def _discovery_is_open(config: Configuration, portal_id: int) -> bool:
    portal = config.portals[portal_id]
    method = portal.discovery_auth_method
    if method == "None":
        method = config.globals.discovery_auth_method
    return not method.startswith("CHAP")


def _places(config: Configuration, portal_id: int, absent: Collection[str]) -> tuple[Place, ...]:
    portal = config.portals[portal_id]
    listening = [split_address(text) for text in portal.addresses if text not in absent]
    if portal.advertised and listening:
        listening = [split_location(text) for text in portal.advertised]
    return tuple(place for place in listening if _can_be_told(place[0]))


def _can_be_told(host: str) -> bool:
    """An address that means the same to others: no host name, which iSNS has no place for, no zone."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not ip.is_link_local
