"""Who may log in: the protocol's ``Authorizer`` over one snapshot of the configuration (api-semantics §7).

A target is granted through its target groups: this portal, to this initiator group, proven this way. The
groups whose portal is the one the connection came in on are asked in the order of their ids.
"""

import ipaddress
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic

from protocol import names
from protocol.access import Credential, Grant, Offer, Refusal, TargetList
from protocol.enums import AuthMethod, LoginStatus
from targetd.config import (
    AuthChoice,
    ChapAlgorithm,
    Configuration,
    Target,
    TargetGroup,
    credentials_by_tag,
    full_name,
    groups_by_target,
    is_wildcard,
    join_location,
    matching_entry,
    parse_network,
    split_address,
    split_list,
    split_location,
    target_named,
)
from targetd.net.discovery import Lists, records
from targetd.net.guesses import GuessLimiter

__all__ = ["AccessSnapshot", "PortalAuthorizer", "Verdict", "credentials_of", "in_networks"]

METHODS: dict[AuthChoice, AuthMethod] = {
    "None": AuthMethod.NONE,
    "Auto": AuthMethod.NONE | AuthMethod.CHAP,
    "CHAP": AuthMethod.CHAP,
    "CHAP Mutual": AuthMethod.CHAP | AuthMethod.CHAP_MUTUAL,
}
"""The API's word → what an initiator may choose (api-semantics §7.3)."""

DECIDING = frozenset(("None", "Header", "Data", "Header Data"))
"""Values of ``initial_digest`` that leave less than everything to the initiator."""

CHAP_NUMBERS: dict[ChapAlgorithm, int] = {"MD5": 5, "SHA1": 6, "SHA256": 7, "SHA3-256": 8}
"""IANA's PPP authentication algorithms, from the weakest to the strongest."""


@dataclass(frozen=True, slots=True)
class AccessSnapshot:
    """What logins are judged by: swapped as a whole when the configuration changes."""

    configuration: Configuration
    handles: Mapping[int, object]
    """Target id → the owner's handle of it (``Grant.target``)."""
    absent: Collection[str] = ()
    """Addresses of portals that are not listened on now; live."""
    lists: Lists = field(default_factory=Lists, compare=False, repr=False)
    """What SendTargets tells."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the initiator groups of a target say of one initiator."""

    group: TargetGroup | None
    """The grant; None: refused."""
    rule: str
    """Which rule decided, in words."""


class PortalAuthorizer:
    """Answers for one connection: it came in on one portal, from one address."""

    def __init__(
        self,
        view: Callable[[], AccessSnapshot],
        portal_id: int,
        peer_host: str,
        local_host: str,
        local_port: int,
        guesses: GuessLimiter | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """
        Args:
            guesses: counts wrong answers to CHAP; one of its own, if not given.
            clock: seconds, for ``guesses``.
        """
        self._view = view
        self._guesses = GuessLimiter() if guesses is None else guesses
        self._clock = clock
        self._portal_id = portal_id
        self._peer_host = peer_host
        self._local_host = local_host
        self._local_port = local_port

    # -- what the login asks ------------------------------------------------------------------

    def discovery(self, initiator_name: str) -> Grant | Refusal:
        """Discovery needs no target: the portal's method wins over the global one (§5.6)."""
        config = self._view().configuration
        closed = self._closed(config)
        if closed is not None:
            return closed
        portal = config.portals[self._portal_id]
        choice, tag = portal.discovery_auth_method, portal.discovery_auth_group
        if choice == "None":
            choice, tag = config.globals.discovery_auth_method, config.globals.discovery_auth_group
        credentials = credentials_of(config, choice, tag)
        return Grant(
            methods=_methods(choice, credentials),
            offer=_offer(config),
            target_portal_group_tag=portal.id,
            credentials=credentials,
            chap_algorithms=_chap_algorithms(config),
        )

    def target(self, initiator_name: str, target_name: str) -> Grant | Refusal:
        view = self._view()
        config = view.configuration
        closed = self._closed(config)
        if closed is not None:
            return closed
        target = target_named(config, target_name.lower())
        if target is None:
            return Refusal(LoginStatus.NOT_FOUND, f"no target {target_name}")
        verdict = self.judge(target, initiator_name)
        group = verdict.group
        if group is None:
            # 0203h and not 0202h: who may not log in does not learn that the target exists (§7.4).
            return Refusal(LoginStatus.NOT_FOUND, verdict.rule)
        moved = self.moved(target)
        if moved is not None:
            return moved
        credentials = credentials_of(config, group.auth_method, group.auth_group)
        return Grant(
            methods=_methods(group.auth_method, credentials),
            offer=replace(
                _offer(config, target.error_recovery_level),
                header_digests=_digests("Header", target, group),
                data_digests=_digests("Data", target, group),
            ),
            r2ts=config.globals.r2t,
            target_portal_group_tag=self._portal_id,
            target_name=target_name.lower(),
            target_alias=target.alias or "",
            credentials=credentials,
            chap_algorithms=_chap_algorithms(config),
            queue_depth=target.queue_depth,
            target=view.handles[target.id],
        )

    def _closed(self, config: Configuration) -> Refusal | None:
        """The connection came in before the door was shut behind it."""
        if not config.service_enabled:
            return Refusal(LoginStatus.SERVICE_UNAVAILABLE, "the service is stopped")
        if self._portal_id not in config.portals:
            return Refusal(LoginStatus.SERVICE_UNAVAILABLE, "the portal was removed")
        return None

    def send_targets(self, initiator_name: str, target_name: str | None) -> TargetList:
        """Targets whose grants contain this portal and whose name rules allow the initiator; networks are
        not asked (§7.4 rule 3)."""
        view = self._view()
        config = view.configuration

        def addresses(portal_id: int) -> list[tuple[str, int]]:
            return self._addresses(config, portal_id)

        if target_name is None:
            way = self._local_host, frozenset(view.absent)
            return view.lists.of(config, self._portal_id, initiator_name, way, addresses)
        target = target_named(config, target_name.lower())
        if target is None:
            return TargetList(())
        return TargetList(records(config, self._portal_id, initiator_name, addresses, [target.id]))

    def chap_wait_s(self, user: str) -> float:
        return self._guesses.wait_s(self._peer_host, user, self._clock())

    def chap_judged(self, user: str, right: bool) -> None:
        self._guesses.judged(self._peer_host, user, right, self._clock())

    # -- how it is decided --------------------------------------------------------------------

    def judge(self, target: Target, initiator_name: str) -> Verdict:
        """Which target group lets this initiator in, or why none does (§7.4 rule 1)."""
        config = self._view().configuration
        groups = groups_by_target(config).get(target.id, ())
        here = [group for group in groups if group.portal_id == self._portal_id]
        name = full_name(config.globals, target)
        try:
            names.normalise(initiator_name)
        except ValueError as error:
            return Verdict(None, f"{initiator_name[:60]!a} is no iSCSI name: it {error}")
        if not here:
            return Verdict(None, f"target {name} is not granted through portal {self._portal_id}")
        reasons = []
        for group in here:
            if group.initiator_group_id is None:
                return Verdict(group, f"target {name} is open to any initiator")
            members = config.initiator_groups[group.initiator_group_id]
            entry = matching_entry(members.initiators, initiator_name)
            called = f"initiator group {members.tag}"
            if entry is None:
                reasons.append(f"{called} does not name it")
            elif entry.startswith("!"):
                return Verdict(None, f"{called} denies {initiator_name} by name ({entry})")
            elif not in_networks(members.auth_network, self._peer_host):
                networks = ", ".join(split_list(members.auth_network))
                reasons.append(f"{called} names it ({entry}), but its networks are {networks}")
            else:
                return Verdict(group, f"{called} allows {initiator_name} ({entry}) from {self._peer_host}")
        return Verdict(
            None,
            f"no initiator group of target {name} allows {initiator_name} from {self._peer_host}: "
            + "; ".join(reasons),
        )

    def moved(self, target: Target) -> Refusal | None:
        """Where a login to this target is sent on to, if anywhere (RFC 7143 §11.13.5): by the target, else by
        the portal. One that has come to the very place is served there, and one that would be sent on from
        there, perhaps in a circle, is served here.

        Before it proves itself: the secrets may be known to the other place alone.
        """
        portal = self._view().configuration.portals.get(self._portal_id)
        if portal is None:
            return None
        here = {self._told(*split_location(text)) for text in portal.advertised}
        here.add(join_location(self._local_host, self._local_port))
        for name, owner in (("the target", target), (f"portal {portal.id}", portal)):
            location = self._told(*split_location(owner.redirect)) if owner.redirect else ""
            if location and location not in here and not self._sends_on(location):
                status = (
                    LoginStatus.TARGET_MOVED_PERMANENTLY
                    if owner.redirect_permanent
                    else LoginStatus.TARGET_MOVED_TEMPORARILY
                )
                return Refusal(status, f"{name} sends logins on to {location}", location)
        return None

    def _sends_on(self, location: str) -> bool:
        """Another portal of ours is there, as this initiator would reach it, and sends logins on in turn."""
        return any(
            location == self._told(*split_address(text))
            for portal in self._view().configuration.portals.values()
            if portal.redirect and portal.id != self._portal_id
            for text in portal.addresses
        )

    def _told(self, host: str, port: int) -> str:
        """An address as initiators are told it: without a zone, which is ours; a wildcard is the address that
        this one came to, and one of the other family nothing."""
        if is_wildcard(host):
            if (":" in host) != (":" in self._local_host):
                return ""
            host = self._local_host
        return join_location(host.partition("%")[0], port)

    def _addresses(self, config: Configuration, portal_id: int) -> list[tuple[str, int]]:
        """Every address of a portal group as SendTargets tells it (§7.4 rule 3): those that are listened on,
        or those advertised in their place if there are any."""
        portal = config.portals[portal_id]
        absent = self._view().absent
        listening = [split_address(text) for text in portal.addresses if text not in absent]
        if portal.advertised and listening:
            listening = [split_location(text) for text in portal.advertised]
        return [(told, portal_id) for place in listening if (told := self._told(*place))]


def _offer(config: Configuration, error_recovery_level: int = 0) -> Offer:
    g = config.globals
    return Offer(
        max_connections=g.max_connections,
        first_burst_length=g.first_burst_length,
        max_burst_length=g.max_burst_length,
        max_recv_data_segment_length=g.max_recv_data_segment_length,
        max_outstanding_r2t=g.max_outstanding_r2t,
        default_time2wait=g.default_time2wait,
        default_time2retain=g.default_time2retain,
        error_recovery_level=error_recovery_level,
    )


def _digests(which: str, target: Target, group: TargetGroup) -> tuple[str, ...]:
    """What may be chosen for HeaderDigest or DataDigest: what the grant says, or the target if the grant
    leaves it open. A digest that is named is demanded; Auto, and what is no word for digests, leaves it to
    the initiator (§7.2)."""
    said = next((text for text in (group.initial_digest, target.initial_digest) if text in DECIDING), "Auto")
    if said == "None":
        return ("None",)
    return ("CRC32C",) if which in said.split() else ("CRC32C", "None")


def _methods(choice: AuthChoice, credentials: tuple[Credential, ...]) -> AuthMethod:
    """What an initiator may choose; of Auto with nobody who could prove anything, None is what is left: many
    initiators offer CHAP first."""
    return AuthMethod.NONE if choice == "Auto" and not credentials else METHODS[choice]


def _chap_algorithms(config: Configuration) -> tuple[int, ...]:
    weakest = CHAP_NUMBERS[config.globals.chap_weakest]
    return tuple(number for number in CHAP_NUMBERS.values() if number >= weakest)


def credentials_of(config: Configuration, choice: AuthChoice, tag: int | None) -> tuple[Credential, ...]:
    """The users of a tag, if the method asks for any."""
    if choice == "None" or tag is None:
        return ()
    return tuple(
        Credential(user.user, user.secret.encode(), user.peer_user, user.peer_secret.encode())
        for user in credentials_by_tag(config).get(tag, ())
    )


def in_networks(networks: str, host: str) -> bool:
    """Whether a peer is in a list of networks; an empty list and ``ALL`` let everybody in."""
    entries = split_list(networks)
    if not entries:
        return True
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    for entry in entries:
        network = parse_network(entry)
        if network is None or (network.version == address.version and address in network):
            return True
    return False
