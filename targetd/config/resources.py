"""The resources of the API as frozen dataclasses, and a ``Configuration`` of them.

Sections are those of the API's semantics (``§5.1`` …).
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias, cast

from targetd.config.fields import AuthTag, OneOf, Range, Reference, Text
from targetd.config.parsing import (
    is_address,
    is_wildcard,
    parse_network,
    split_address,
    split_list,
    split_location,
)
from targetd.config.versioned import VersionedMap

__all__ = [
    "BLOCK_SIZES",
    "COLLECTIONS",
    "DIGESTS",
    "GLOBALS",
    "MAX_LENGTH",
    "MAX_LUN",
    "MAX_TAG",
    "RPMS",
    "SIZED",
    "VOLATILE",
    "AuthChoice",
    "AuthCredential",
    "ChapAlgorithm",
    "Collection",
    "Configuration",
    "Extent",
    "ExtentType",
    "GlobalConfiguration",
    "InitiatorGroup",
    "LunMapping",
    "Portal",
    "Resource",
    "Target",
    "TargetGroup",
    "objects",
]

AuthChoice = Literal["None", "Auto", "CHAP", "CHAP Mutual"]
ChapAlgorithm = Literal["MD5", "SHA1", "SHA256", "SHA3-256"]
"""As initiators spell them; from the weakest to the strongest."""
ExtentType = Literal["File", "Disk", "Device", "ZVOL", "ZFS Volume", "Memory", "Null"]
"""As the client said it. Disk = Device; ZVOL = ZFS Volume. Memory and Null are ours."""

VOLATILE = frozenset(("Memory", "Null"))
"""Types whose contents are gone when the daemon ends: for tests and benchmarks."""
SIZED = VOLATILE | {"File"}
"""Types that are as large as they are told to be."""

Collection = Literal[
    "extents", "initiator_groups", "credentials", "portals", "targets", "target_groups", "lun_mappings"
]
GLOBALS: Literal["globals"] = "globals"
"""Stands where a collection's name stands when the global configuration is meant."""

MAX_LUN = 16383
"""The flat space addressing method holds 14 bits (SAM-5 §4.7.7.3); FreeNAS stopped at 1023."""
MAX_TAG = 2**31 - 1
"""What FreeNAS' integer fields hold."""
MAX_LENGTH = 2**24 - 1
"""The largest burst or segment (RFC 7143 §13.12 to §13.14)."""
BLOCK_SIZES = (512, 1024, 2048, 4096)
DIGESTS = ("Auto", "None", "Header", "Data", "Header Data", "CHAP", "CHAP Mutual")
"""Which digests a login must or may agree to, in istgt's words: those named are demanded; Auto: both as the
initiator likes; None: neither. The last two stand in FreeNAS' documents, where the text of the field for
authentication was copied, and are as good as Auto."""
RPMS = ("Unknown", "SSD", "5400", "7200", "10000", "15000")


def _bad_address(text: str) -> str | None:
    return None if is_address(text) else "Enter a valid IPv4 or IPv6 address."


def _bad_networks(text: str) -> str | None:
    try:
        for token in split_list(text):
            parse_network(token)
    except ValueError as error:
        return str(error)
    return None


def _bad_isns_servers(text: str) -> str | None:
    wrong = []
    for token in split_list(text):
        try:
            split_address(token)
        except ValueError:
            wrong.append(token)
    return f"The following addresses are not valid: {', '.join(wrong)}" if wrong else None


def _bad_redirect(text: str) -> str | None:
    try:
        host, _ = split_location(text)
    except ValueError as error:
        return str(error)
    return f"{text}: initiators cannot be sent to every address." if is_wildcard(host) else None


def _bad_alias(text: str) -> str | None:
    return "target is a reserved word" if text.lower() == "target" else None


_UNQUOTED = Text(max_length=120, required=True, pattern='[^"]*', message="Double quotes are not allowed.")
_SERIAL = Text(
    max_length=16, pattern="[ !#-~]*", message="Use printable ASCII characters except the double quote."
)
_COMMENT = Text(max_length=120, lines=True)
_LIST = Text(max_length=2048, lines=True)
_NETWORKS = Text(max_length=2048, lines=True, check=_bad_networks)
_BASENAME = Text(
    max_length=120,
    required=True,
    pattern=r"(?i:iqn\.[0-9]{4}-(?:0[1-9]|1[0-2])\.[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?(?::[-a-z0-9.:]+)?"
    r"|eui\.[0-9a-f]{16}|naa\.(?:[0-9a-f]{16}){1,2})",
    message="Enter an iSCSI name of the form iqn.YYYY-MM.domain[:name], eui.… or naa.…, without blanks.",
)
_NAA = Text(
    max_length=34,
    pattern="(?i:0x6[0-9a-f]{31}|0x[235][0-9a-f]{15})",
    message="Enter 0x and 32 hexadecimal digits (NAA 6) or 16 (NAA 2, 3, 5).",
)

_REDIRECT = Text(max_length=280, check=_bad_redirect)

Id: TypeAlias = Annotated[int, Range(1, 2**63 - 1)]
Tag: TypeAlias = Annotated[int, Range(1, MAX_TAG)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalConfiguration:
    """What holds for every target. Lengths in bytes, times in seconds (§5.1, §7.2)."""

    basename: Annotated[str, _BASENAME] = "iqn.2011-03.org.example.istgt"
    discovery_auth_method: AuthChoice = "None"
    discovery_auth_group: Annotated[int | None, Range(1, MAX_TAG), AuthTag("discovery_auth_method")] = None
    chap_weakest: ChapAlgorithm = "MD5"
    """The weakest algorithm that a login, to a target or for discovery, may prove itself with."""
    io_timeout_s: Annotated[int, Range(0, 300)] = 30
    """How long a peer may stall inside a PDU; 0 = no limit."""
    nop_in_interval_s: Annotated[int, Range(0, 300)] = 20
    """0 = off."""
    max_sessions: Annotated[int, Range(1, 65535)] = 16
    max_connections: Annotated[int, Range(1, 65535)] = 8
    r2t: Annotated[int, Range(0, 256)] = 32
    max_outstanding_r2t: Annotated[int, Range(1, 65535)] = 16
    first_burst_length: Annotated[int, Range(512, MAX_LENGTH)] = 65536
    max_burst_length: Annotated[int, Range(512, MAX_LENGTH)] = 262144
    max_recv_data_segment_length: Annotated[int, Range(512, MAX_LENGTH)] = 262144
    default_time2wait: Annotated[int, Range(0, 3600)] = 2
    default_time2retain: Annotated[int, Range(0, 3600)] = 60
    luc_enabled: bool = False
    luc_ip: Annotated[str | None, Text(max_length=64, check=_bad_address)] = "127.0.0.1"
    luc_port: Annotated[int | None, Range(1, 65535)] = 3261
    luc_auth_network: Annotated[str, _NETWORKS] = ""
    """Empty = 127.0.0.0/8."""
    luc_auth_method: Literal["", "None", "Auto", "CHAP", "CHAP Mutual"] = ""
    """Empty = CHAP."""
    luc_auth_group: Annotated[int | None, Range(1, MAX_TAG), AuthTag("luc_auth_method")] = None
    isns_servers: Annotated[str, Text(max_length=2048, lines=True, check=_bad_isns_servers)] = ""
    pool_avail_threshold: Annotated[int | None, Range(1, 99)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A piece of storage that can be a logical unit (§5.2)."""

    id: Id
    name: Annotated[str, _UNQUOTED]
    type: ExtentType
    path: Annotated[str, Text(max_length=120, required=True)]
    """Absolute path of the file or device node."""
    file_size: Annotated[str, Text(max_length=120)] = "0"
    """As the client said it, normalised (``10MB``); ``0`` = the size of what is there."""
    size_bytes: Annotated[int, Range(0, 2**63 - 1)] = 0
    """``file_size`` in bytes; 0 = auto."""
    comment: Annotated[str, _COMMENT] = ""
    naa: Annotated[str, _NAA] = ""
    """``0x`` and 32 hexadecimal digits (NAA 6) or 16 (NAA 2, 3, 5); made at creation, then fixed."""
    insecure_tpc: bool = True
    serial: Annotated[str, _SERIAL] = ""
    serial_given: bool = False
    """The client set ``serial``; decides who wins in VPD page 80h (api-semantics §5.2)."""
    block_size: Annotated[int, OneOf(BLOCK_SIZES)] = 512
    physical_block_size_hidden: bool = False
    avail_threshold: Annotated[int | None, Range(1, 99)] = None
    """Per cent."""
    xen: bool = False
    rpm: Annotated[str, OneOf(RPMS)] = "SSD"
    read_only: bool = False
    legacy: bool = False
    removable: bool = False
    """Initiators may eject the medium and load it again."""
    allocate: bool = False
    """File: all its space is taken when it is made; otherwise blocks are taken as they are written."""
    iops_limit: Annotated[int, Range(0, 10**9)] = 0
    """Commands that move data, a second; 0 = no limit."""
    bandwidth_limit: Annotated[int, Range(0, 10**15)] = 0
    """Bytes a second; 0 = no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitiatorGroup:
    """Who may log in, and from where (§5.3, §7.4)."""

    id: Id
    tag: Tag
    initiators: Annotated[str, _LIST] = "ALL"
    auth_network: Annotated[str, _NETWORKS] = "ALL"
    comment: Annotated[str, _COMMENT] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthCredential:
    """One CHAP user; several share a tag (§5.4)."""

    id: Id
    tag: Tag
    user: Annotated[str, Text(max_length=120, required=True)]
    secret: Annotated[str, Text(max_length=120, required=True)] = field(repr=False)
    peer_user: Annotated[str, Text(max_length=120)] = ""
    peer_secret: Annotated[str, Text(max_length=120)] = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Portal:
    """A portal group: addresses that lead to the same targets (§5.6)."""

    id: Annotated[int, Range(1, 65535, "A portal's id is its TargetPortalGroupTag and ends at {1}.")]
    """Also its TargetPortalGroupTag, of 16 bits, which therefore never moves (§6.4)."""
    tag: Tag
    comment: Annotated[str, _COMMENT] = ""
    addresses: tuple[str, ...] = ()
    """``IP:PORT`` as the client said it; ``split_address`` reads them."""
    advertised: tuple[str, ...] = ()
    """``HOST:PORT`` told to initiators in place of ``addresses``, as where NAT is between; ``split_location``
    reads them."""
    discovery_auth_method: AuthChoice = "None"
    discovery_auth_group: Annotated[int | None, Range(1, MAX_TAG), AuthTag("discovery_auth_method")] = None
    redirect: Annotated[str, _REDIRECT] = ""
    """``HOST:PORT`` where a login to any target is sent on to; empty = nowhere."""
    redirect_permanent: bool = False
    """The initiator shall remember it (RFC 7143 §11.13.5: 0102h, not 0101h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A target (§5.5). Its name is as stored; ``full_name`` makes the iSCSI name."""

    id: Id
    name: Annotated[
        str,
        Text(
            max_length=120,
            required=True,
            pattern="[-a-z0-9.:]+",
            message='Use alphanumeric characters, ".", "-" and ":".',
        ),
    ]
    alias: Annotated[
        str | None,
        Text(max_length=120, pattern='[^"]*', message="Double quotes are not allowed.", check=_bad_alias),
    ] = None
    serial: Annotated[str, _SERIAL] = ""
    serial_given: bool = False
    type: Annotated[str, OneOf(("Disk",))] = "Disk"
    flags: Literal["rw", "ro"] = "rw"
    initial_digest: Annotated[str, OneOf(DIGESTS)] = "Auto"
    """For grants that leave it open (§7.2)."""
    queue_depth: Annotated[int, Range(0, 255)] = 32
    logical_block_size: Annotated[int, OneOf(BLOCK_SIZES)] = 512
    mode: Literal["iscsi"] = "iscsi"
    redirect: Annotated[str, _REDIRECT] = ""
    """``HOST:PORT`` where a login is sent on to, before what its portal says; empty = nowhere."""
    redirect_permanent: bool = False
    error_recovery_level: Annotated[int, Range(0, 2)] = 0
    """The highest that is offered at login (RFC 7143 §13.20); a field of our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetGroup:
    """A grant: this target, through this portal group, to this initiator group, proven this way (§5.8)."""

    id: Id
    target_id: Annotated[int, Reference("targets")]
    portal_id: Annotated[int, Reference("portals")]
    initiator_group_id: Annotated[int | None, Reference("initiator_groups")] = None
    """None = any initiator."""
    auth_method: AuthChoice = "None"
    auth_group: Annotated[int | None, Range(1, MAX_TAG), AuthTag("auth_method")] = None
    """The tag of the credentials."""
    initial_digest: Annotated[str, OneOf(DIGESTS)] = "Auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LunMapping:
    """An extent as a LUN of a target (``targettoextent``, §5.7)."""

    id: Id
    target_id: Annotated[int, Reference("targets")]
    extent_id: Annotated[int, Reference("extents")]
    lun: Annotated[int, Range(0, MAX_LUN, f"LUN ID must be a positive integer and lower than {MAX_LUN + 1}.")]


Resource: TypeAlias = Extent | InitiatorGroup | AuthCredential | Portal | Target | TargetGroup | LunMapping

COLLECTIONS: Mapping[Collection, type[Resource]] = types.MappingProxyType(
    {
        "extents": Extent,
        "initiator_groups": InitiatorGroup,
        "credentials": AuthCredential,
        "portals": Portal,
        "targets": Target,
        "target_groups": TargetGroup,
        "lun_mappings": LunMapping,
    }
)
"""Collection → what is in it; a collection stands after those it refers to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Everything, at one moment. The mappings go from id to object and are never mutated; whatever mapping a
    collection is given as, it is kept as ``VersionedMap``."""

    globals: GlobalConfiguration = field(default_factory=GlobalConfiguration)
    extents: Mapping[int, Extent] = field(default_factory=VersionedMap)
    initiator_groups: Mapping[int, InitiatorGroup] = field(default_factory=VersionedMap)
    credentials: Mapping[int, AuthCredential] = field(default_factory=VersionedMap)
    portals: Mapping[int, Portal] = field(default_factory=VersionedMap)
    targets: Mapping[int, Target] = field(default_factory=VersionedMap)
    target_groups: Mapping[int, TargetGroup] = field(default_factory=VersionedMap)
    lun_mappings: Mapping[int, LunMapping] = field(default_factory=VersionedMap)
    service_enabled: bool = True
    """``services/services/iscsitarget`` srv_enable: portals listen only while it is true."""
    last_ids: Mapping[str, int] = field(default_factory=dict)
    """Collection name (``extents``, ``targets`` …) → the highest id ever given out there: no lower than any
    that is there."""
    derived: dict[object, object] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Look-ups made from the above, see ``lookups.py``. The one thing here that grows after creation."""

    def __post_init__(self) -> None:
        for collection in COLLECTIONS:
            members = getattr(self, collection)
            if isinstance(members, VersionedMap):
                continue
            object.__setattr__(self, collection, VersionedMap(members))
            highest = max(members, default=0)
            if highest > self.last_ids.get(collection, 0):
                object.__setattr__(self, "last_ids", {**self.last_ids, collection: highest})


def objects(config: Configuration, collection: Collection) -> VersionedMap[Resource]:
    """One collection of the configuration by its name."""
    return cast(VersionedMap[Resource], getattr(config, collection))
