"""The configuration as immutable data, and what makes one valid. Does no I/O.

Every resource of the API is one frozen dataclass here; a ``Configuration`` is all of them at one
moment. A change makes a new ``Configuration`` from the old; nothing is ever edited in place, so the
engine and the API may hold on to what they have been given.

``id`` is the database identity: positive, never reused. ``tag`` is the group number that people see;
other objects refer to a credential group by tag and to everything else by id.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "AuthChoice",
    "AuthCredential",
    "Configuration",
    "Extent",
    "ExtentType",
    "GlobalConfiguration",
    "InitiatorGroup",
    "LunMapping",
    "Portal",
    "Target",
    "TargetGroup",
]

AuthChoice = Literal["None", "Auto", "CHAP", "CHAP Mutual"]
ExtentType = Literal["File", "Disk", "Device", "ZVOL", "ZFS Volume"]
"""As the client said it. Disk = Device; ZVOL = ZFS Volume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalConfiguration:
    """What holds for every target. Lengths in bytes, times in seconds."""

    basename: str = "iqn.2011-03.org.example.istgt"
    discovery_auth_method: AuthChoice = "None"
    discovery_auth_group: int | None = None
    io_timeout_s: int = 30
    nop_in_interval_s: int = 20
    max_sessions: int = 16
    max_connections: int = 8
    r2t: int = 32
    max_outstanding_r2t: int = 16
    first_burst_length: int = 65536
    max_burst_length: int = 262144
    max_recv_data_segment_length: int = 262144
    default_time2wait: int = 2
    default_time2retain: int = 60
    luc_enabled: bool = False
    luc_ip: str | None = "127.0.0.1"
    luc_port: int | None = 3261
    luc_auth_network: str = ""
    luc_auth_method: Literal["", "None", "Auto", "CHAP", "CHAP Mutual"] = ""
    luc_auth_group: int | None = None
    isns_servers: str = ""
    pool_avail_threshold: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A piece of storage that can be a logical unit."""

    id: int
    name: str
    type: ExtentType
    path: str
    """Absolute path of the file or device node."""
    file_size: str = "0"
    """As the client said it, normalised (``10MB``); ``0`` = the size of what is there."""
    size_bytes: int = 0
    """``file_size`` in bytes; 0 = auto."""
    comment: str = ""
    naa: str = ""
    """``0x`` and 32 hexadecimal digits (NAA 6) or 16 (NAA 2, 3, 5); made at creation, then fixed."""
    insecure_tpc: bool = True
    serial: str = ""
    serial_given: bool = False
    """The client set ``serial``; decides who wins in VPD page 80h (api-semantics §5.2)."""
    block_size: int = 512
    physical_block_size_hidden: bool = False
    avail_threshold: int | None = None
    xen: bool = False
    rpm: str = "SSD"
    read_only: bool = False
    legacy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InitiatorGroup:
    """Who may log in, and from where (api-semantics §7.4)."""

    id: int
    tag: int
    initiators: str = "ALL"
    auth_network: str = "ALL"
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthCredential:
    """One CHAP user; several share a tag."""

    id: int
    tag: int
    user: str
    secret: str = field(repr=False)
    peer_user: str = ""
    peer_secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Portal:
    """A portal group: addresses that lead to the same targets. Its TargetPortalGroupTag is its id."""

    id: int
    tag: int
    comment: str = ""
    addresses: tuple[str, ...] = ()
    """``IP:PORT`` as the client said it; ``targetd.model.split_address`` reads them."""
    discovery_auth_method: AuthChoice = "None"
    discovery_auth_group: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A target. Its name is as stored; ``Configuration.full_name`` makes the iSCSI name."""

    id: int
    name: str
    alias: str | None = None
    serial: str = ""
    serial_given: bool = False
    type: str = "Disk"
    flags: Literal["rw", "ro"] = "rw"
    initial_digest: str = "Auto"
    """Stored and echoed, never used (api-semantics §5.5)."""
    queue_depth: int = 32
    logical_block_size: int = 512
    mode: Literal["iscsi", "fc", "both"] = "iscsi"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetGroup:
    """A grant: this target, through this portal group, to this initiator group, proven this way."""

    id: int
    target_id: int
    portal_id: int
    initiator_group_id: int | None = None
    """None = any initiator."""
    auth_method: AuthChoice = "None"
    auth_group: int | None = None
    """The tag of the credentials."""
    initial_digest: str = "Auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LunMapping:
    """An extent as a LUN of a target (``targettoextent``)."""

    id: int
    target_id: int
    extent_id: int
    lun: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Everything, at one moment. The mappings go from id to object and are never mutated."""

    globals: GlobalConfiguration = field(default_factory=GlobalConfiguration)
    extents: Mapping[int, Extent] = field(default_factory=dict)
    initiator_groups: Mapping[int, InitiatorGroup] = field(default_factory=dict)
    credentials: Mapping[int, AuthCredential] = field(default_factory=dict)
    portals: Mapping[int, Portal] = field(default_factory=dict)
    targets: Mapping[int, Target] = field(default_factory=dict)
    target_groups: Mapping[int, TargetGroup] = field(default_factory=dict)
    lun_mappings: Mapping[int, LunMapping] = field(default_factory=dict)
    service_enabled: bool = True
    """``services/services/iscsitarget`` srv_enable: portals listen only while it is true."""
    last_ids: Mapping[str, int] = field(default_factory=dict)
    """Collection name (``extents``, ``targets`` …) → the highest id ever given out there."""
