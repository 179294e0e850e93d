"""The resources as the wire has them: one table each (api-semantics §5).

A row names the attribute in ``targetd.config``, its name on the wire and what it means to a user. Type,
default, bounds and choices are the model's and are not repeated here. Wire names appear in this file and
nowhere else in the daemon.
"""

from typing import Final

from api.schema import Declaration, Field, as_nullable
from targetd.config import (
    DIGESTS,
    GLOBALS,
    AuthCredential,
    Extent,
    FieldRule,
    GlobalConfiguration,
    InitiatorGroup,
    LunMapping,
    Portal,
    Target,
    TargetGroup,
    Text,
    parse_size,
    rules,
)

__all__ = [
    "AUTH_CREDENTIAL",
    "DECLARATIONS",
    "EXTENT",
    "GLOBAL_CONFIGURATION",
    "INITIATOR_GROUP",
    "LUN_MAPPING",
    "PORTAL",
    "TARGET",
    "TARGET_GROUP",
]

_RPM_SPELLINGS: Final = {str(rpm).lower(): str(rpm) for rpm in rules(Extent)["rpm"].choices or ()}
_GRANT: Final = rules(TargetGroup)
_METHODS: Final = "None, Auto, CHAP or CHAP Mutual"


def _rpm(text: str) -> str:
    return _RPM_SPELLINGS.get(text.lower(), text)


def _digest(text: str) -> str:
    """In any case and order, with commas or without."""
    words = text.replace(",", " ").lower().split()
    spelled = "header data" if sorted(words) == ["data", "header"] else " ".join(words)
    return next((choice for choice in DIGESTS if choice.lower() == spelled), text)


def _size(text: str) -> str:
    return parse_size(text)[0]


def _told(attribute: str, wire: str, help_text: str, default: str) -> Field:
    """What is known of an object beside its configuration."""
    rule = FieldRule(
        attribute=attribute,
        type=str,
        nullable=False,
        required=False,
        default=default,
        secret=False,
        text=Text(max_length=1024),
    )
    return Field(
        attribute=attribute, wire=wire, help_text=help_text, rule=rule, read_only=True, example=default
    )


def _status(wire: str, help_text: str) -> Field:
    """What the engine knows of an object."""
    return _told("status", wire, help_text, default="ok")


GLOBAL_CONFIGURATION: Final = Declaration(
    title="GlobalConfiguration",
    summary="What holds for every target.",
    record=GlobalConfiguration,
    collection=GLOBALS,
    fields=(
        Field(
            attribute="basename",
            wire="iscsi_basename",
            help_text="Goes before every target name that is no iSCSI name already, with a colon between.",
            example="iqn.2011-03.org.example.istgt",
        ),
        Field(
            attribute="discovery_auth_method",
            wire="iscsi_discoveryauthmethod",
            help_text=f"How an initiator proves itself for discovery: {_METHODS}.",
        ),
        Field(
            attribute="discovery_auth_group",
            wire="iscsi_discoveryauthgroup",
            help_text="Tag of the credentials for discovery; needed for CHAP and CHAP Mutual.",
        ),
        Field(
            attribute="chap_weakest",
            wire="iscsi_chap_weakest",
            help_text="The weakest algorithm that logins may use for CHAP: MD5, SHA1, SHA256 or SHA3-256. "
            "Not for the logical unit controller, which knows none but MD5.",
        ),
        Field(
            attribute="io_timeout_s",
            wire="iscsi_iotimeout",
            help_text="Seconds that a peer may stall inside a PDU before it is dropped; 0 = no limit.",
        ),
        Field(
            attribute="nop_in_interval_s",
            wire="iscsi_nopinint",
            help_text="Seconds between pings of an idle initiator, dropped if it misses one; 0 = off.",
        ),
        Field(
            attribute="max_sessions",
            wire="iscsi_maxsesh",
            help_text="Normal sessions held at the same time, over all targets.",
        ),
        Field(
            attribute="max_connections",
            wire="iscsi_maxconnect",
            help_text="MaxConnections offered: connections in one session.",
        ),
        Field(
            attribute="r2t",
            wire="iscsi_r2t",
            help_text="R2Ts open on one connection at a time, over all its writes; 0 = 1. For new sessions.",
        ),
        Field(
            attribute="max_outstanding_r2t",
            wire="iscsi_maxoutstandingr2t",
            help_text="MaxOutstandingR2T offered.",
        ),
        Field(
            attribute="first_burst_length",
            wire="iscsi_firstburst",
            help_text="FirstBurstLength offered, in bytes; at most the maximum burst.",
        ),
        Field(
            attribute="max_burst_length",
            wire="iscsi_maxburst",
            help_text="MaxBurstLength offered, in bytes.",
        ),
        Field(
            attribute="max_recv_data_segment_length",
            wire="iscsi_maxrecdata",
            help_text="MaxRecvDataSegmentLength declared by the target, in bytes.",
        ),
        Field(
            attribute="default_time2wait",
            wire="iscsi_defaultt2w",
            help_text="DefaultTime2Wait, in seconds; the larger of both sides counts.",
        ),
        Field(
            attribute="default_time2retain",
            wire="iscsi_defaultt2r",
            help_text="DefaultTime2Retain, in seconds; the smaller of both sides counts.",
        ),
        Field(
            attribute="luc_enabled",
            wire="iscsi_toggleluc",
            help_text="Serve the logical unit controller, the line protocol of istgtcontrol.",
        ),
        Field(attribute="luc_ip", wire="iscsi_lucip", help_text="Address of the controller, v4 or v6."),
        Field(attribute="luc_port", wire="iscsi_lucport", help_text="TCP port of the controller."),
        Field(
            attribute="luc_auth_network",
            wire="iscsi_luc_authnetwork",
            help_text="Networks that may speak to the controller; empty = 127.0.0.0/8.",
        ),
        Field(
            attribute="luc_auth_method",
            wire="iscsi_luc_authmethod",
            help_text=f"How a client of the controller proves itself: {_METHODS}; empty = CHAP.",
            blank=True,
        ),
        Field(
            attribute="luc_auth_group",
            wire="iscsi_luc_authgroup",
            help_text="Tag of the credentials for the controller.",
        ),
        Field(
            attribute="isns_servers",
            wire="iscsi_isns_servers",
            help_text="iSNS servers where the targets are registered, IP[:PORT], separated by blanks; port "
            "3205 if none is given. Targets that need a proof for discovery at every portal are left out.",
        ),
        Field(
            attribute="pool_avail_threshold",
            wire="iscsi_pool_avail_threshold",
            help_text="Per cent of free space at which initiators are warned: of extents that have no "
            "threshold of their own.",
        ),
    ),
)

EXTENT: Final = Declaration(
    title="Extent",
    summary="A file or device that can be a logical unit.",
    record=Extent,
    collection="extents",
    fields=(
        Field(
            attribute="name",
            wire="iscsi_target_extent_name",
            help_text="Name of the extent; no other has it.",
            example="extent",
        ),
        Field(
            attribute="type",
            wire="iscsi_target_extent_type",
            help_text="File, Disk (also called Device) or ZVOL (also called ZFS Volume). For tests and "
            "benchmarks Memory and Null, which are volatile: what is written is gone when the daemon ends.",
            example="File",
        ),
        Field(
            attribute="path",
            wire="iscsi_target_extent_path",
            help_text="Absolute path of the file or device, inside one of the directories for extents.",
            required=False,
            blank=True,
            example="/mnt/tank/iscsi",
        ),
        Field(
            attribute="disk",
            wire="iscsi_target_extent_disk",
            help_text="A device by its name below /dev, in place of the path: ada1, zvol/pool/name.",
            rule=FieldRule(
                attribute="disk",
                type=str,
                nullable=False,
                required=False,
                default="",
                secret=False,
                text=Text(max_length=120),
            ),
            write_only=True,
        ),
        Field(
            attribute="file_size",
            wire="iscsi_target_extent_filesize",
            help_text="Bytes, or a number with KB, MB, GB, TB (powers of 1024); 0 = that of what is there.",
            empty="0",
            convert=_size,
            example="10MB",
        ),
        Field(attribute="comment", wire="iscsi_target_extent_comment", help_text="For people."),
        Field(
            attribute="naa",
            wire="iscsi_target_extent_naa",
            help_text="NAA identifier in VPD page 83h: 0x and 32 hexadecimal digits, or 16. Made if not "
            "given at creation; no other extent has it, and it never changes.",
            convert=str.lower,
        ),
        Field(
            attribute="insecure_tpc",
            wire="iscsi_target_extent_insecure_tpc",
            help_text="A third-party copy (EXTENDED COPY, tokens) may reach it from another target, if that "
            "one's extent allows it too and the initiator has a session with both targets (same name and "
            "CHAP user, or same address), or would be let in to the other with what it has proven. False: "
            "only from its own target.",
        ),
        Field(
            attribute="serial",
            wire="iscsi_target_extent_serial",
            help_text="Serial number in VPD page 80h; made if not given. No other extent has it.",
        ),
        Field(
            attribute="block_size",
            wire="iscsi_target_extent_blocksize",
            help_text="Logical block size in bytes.",
        ),
        Field(
            attribute="physical_block_size_hidden",
            wire="iscsi_target_extent_pblocksize",
            help_text="True: do not report a physical block size.",
        ),
        Field(
            attribute="avail_threshold",
            wire="iscsi_target_extent_avail_threshold",
            help_text="Per cent of free space at which initiators are warned; null: the global one.",
        ),
        Field(
            attribute="xen",
            wire="iscsi_target_extent_xen",
            help_text="True: the device identifier is not padded with blanks.",
        ),
        Field(
            attribute="rpm",
            wire="iscsi_target_extent_rpm",
            help_text="Rotation rate reported in VPD page B1h.",
            convert=_rpm,
        ),
        Field(
            attribute="read_only",
            wire="iscsi_target_extent_ro",
            help_text="Initiators may only read.",
        ),
        Field(
            attribute="removable",
            wire="iscsi_target_extent_removable",
            help_text="True: a removable medium, which initiators may eject and load again.",
        ),
        Field(
            attribute="legacy",
            wire="iscsi_target_extent_legacy",
            help_text="True: the INQUIRY vendor is FreeBSD.",
            read_only=True,
        ),
        Field(
            attribute="allocate",
            wire="iscsi_target_extent_allocate",
            help_text="Take all the space of a File extent at once, and keep it; otherwise as it is written.",
        ),
        Field(
            attribute="iops_limit",
            wire="iscsi_target_extent_iops_limit",
            help_text="Reads and writes a second, 2 s worth of them at once; 0 = no limit. Changed live.",
        ),
        Field(
            attribute="bandwidth_limit",
            wire="iscsi_target_extent_bandwidth_limit",
            help_text="Bytes read and written a second, 2 s worth of them at once; 0 = no limit.",
        ),
        _status("iscsi_target_extent_status", "ok, or what is wrong with the medium in words."),
    ),
)

INITIATOR_GROUP: Final = Declaration(
    title="AuthorizedInitiator",
    summary="Who may log in, and from where.",
    record=InitiatorGroup,
    collection="initiator_groups",
    fields=(
        Field(
            attribute="tag",
            wire="iscsi_target_initiator_tag",
            help_text="Group number for people; the lowest free one if not given.",
            required=False,
            nullable=True,
        ),
        Field(
            attribute="initiators",
            wire="iscsi_target_initiator_initiators",
            help_text="Initiator names, or ALL; !name denies. Separated by blanks, commas or newlines.",
            blank=False,
        ),
        Field(
            attribute="auth_network",
            wire="iscsi_target_initiator_auth_network",
            help_text="Addresses and networks (CIDR) of initiators, or ALL.",
            blank=False,
        ),
        Field(
            attribute="comment",
            wire="iscsi_target_initiator_comment",
            help_text="For people.",
            # as the parameter list of the specification spells it
            also=("scsi_target_initiator_comment",),
        ),
        _told(
            "warning",
            "iscsi_target_initiator_warning",
            "Entries that can never match an initiator, and why; empty when there are none.",
            default="",
        ),
    ),
)

AUTH_CREDENTIAL: Final = Declaration(
    title="AuthCredential",
    summary="One CHAP user. Users that share a tag are a group.",
    record=AuthCredential,
    collection="credentials",
    fields=(
        Field(
            attribute="tag",
            wire="iscsi_target_auth_tag",
            help_text="Group number; targets, portals and the global configuration refer to it.",
            required=False,
            default=1,
        ),
        Field(
            attribute="user",
            wire="iscsi_target_auth_user",
            verbatim=True,
            help_text="CHAP name that the initiator must present.",
            example="user",
        ),
        Field(
            attribute="secret",
            wire="iscsi_target_auth_secret",
            verbatim=True,
            help_text="CHAP secret of the initiator; many initiators want 12 to 16 characters.",
        ),
        Field(
            attribute="peer_user",
            wire="iscsi_target_auth_peeruser",
            verbatim=True,
            help_text="CHAP name that the target answers with (CHAP Mutual).",
        ),
        Field(
            attribute="peer_secret",
            wire="iscsi_target_auth_peersecret",
            verbatim=True,
            help_text="CHAP secret of the target; not the initiator's.",
        ),
    ),
)

TARGET: Final = Declaration(
    title="Target",
    summary="A target. The portal group, initiator group and authentication shown are its first grant's.",
    record=Target,
    collection="targets",
    fields=(
        Field(
            attribute="name",
            wire="iscsi_target_name",
            help_text="An iSCSI name (iqn., eui., naa.), or the part that follows the base name.",
            convert=str.lower,
            example="target",
        ),
        Field(attribute="alias", wire="iscsi_target_alias", help_text="A name for people; no other has it."),
        Field(
            attribute="serial",
            wire="iscsi_target_serial",
            help_text="Serial number of the logical units, before the LUN; 10000000 + id if not given.",
        ),
        Field(attribute="type", wire="iscsi_target_type", help_text="Always Disk."),
        Field(attribute="flags", wire="iscsi_target_flags", help_text="rw, or ro for all LUNs."),
        Field(
            attribute="portal_id",
            wire="iscsi_target_portalgroup",
            help_text="id of the portal group of the first grant.",
            rule=as_nullable(_GRANT["portal_id"]),
            required=False,
        ),
        Field(
            attribute="initiator_group_id",
            wire="iscsi_target_initiatorgroup",
            help_text="id of the initiator group of the first grant; null = any initiator.",
            rule=_GRANT["initiator_group_id"],
        ),
        Field(
            attribute="auth_method",
            wire="iscsi_target_authtype",
            help_text=f"How initiators of the first grant prove themselves: {_METHODS}.",
            rule=as_nullable(_GRANT["auth_method"]),
            default="Auto",
        ),
        Field(
            attribute="auth_group",
            wire="iscsi_target_authgroup",
            help_text="Tag of the credentials of the first grant.",
            rule=_GRANT["auth_group"],
        ),
        Field(
            attribute="initial_digest",
            wire="iscsi_target_initialdigest",
            help_text="Digests of logins: Header, Data or Header Data demands CRC32C for them, None allows "
            "none, Auto leaves both to the initiator. For grants that say Auto. CHAP and CHAP Mutual, which "
            "FreeNAS' documents have here, are Auto.",
            convert=_digest,
        ),
        Field(
            attribute="queue_depth",
            wire="iscsi_target_queue_depth",
            help_text="Commands that an initiator may have under way, from now on; 0 = command queueing off.",
        ),
        Field(
            attribute="logical_block_size",
            wire="iscsi_target_logical_blocksize",
            help_text="Logical block size in bytes; 512 leaves it to the extent.",
        ),
        Field(
            attribute="mode",
            wire="iscsi_target_mode",
            help_text="Always iscsi: fc and both are refused, as there is no Fibre Channel here.",
        ),
        Field(
            attribute="redirect",
            wire="iscsi_target_redirect",
            help_text="HOST:PORT where logins to the target are sent on to; empty = nowhere. One that has "
            "come there is served.",
        ),
        Field(
            attribute="redirect_permanent",
            wire="iscsi_target_redirect_permanent",
            help_text="True: the target has moved for good, and initiators may remember it.",
        ),
        Field(
            attribute="error_recovery_level",
            wire="iscsi_target_error_recovery_level",
            help_text="Highest error recovery level offered to new sessions. 0: a lost connection ends its "
            "session. 1: what a digest shows to be damaged is sent again. 2: commands of a lost connection "
            "go on on another.",
        ),
    ),
)

TARGET_GROUP: Final = Declaration(
    title="TargetGroup",
    summary="A grant: a target, through a portal group, to an initiator group, proven this way.",
    record=TargetGroup,
    collection="target_groups",
    fields=(
        Field(attribute="target_id", wire="iscsi_target", help_text="id of the target."),
        Field(attribute="portal_id", wire="iscsi_target_portalgroup", help_text="id of the portal group."),
        Field(
            attribute="initiator_group_id",
            wire="iscsi_target_initiatorgroup",
            help_text="id of the initiator group; null = any initiator.",
        ),
        Field(
            attribute="auth_method",
            wire="iscsi_target_authtype",
            help_text=f"{_METHODS}.",
            empty="None",
        ),
        Field(attribute="auth_group", wire="iscsi_target_authgroup", help_text="Tag of the credentials."),
        Field(
            attribute="initial_digest",
            wire="iscsi_target_initialdigest",
            help_text="Digests of logins by this grant: Header, Data or Header Data demands CRC32C for them, "
            "None allows none; Auto, CHAP and CHAP Mutual leave it to the target's.",
            convert=_digest,
        ),
    ),
)

PORTAL: Final = Declaration(
    title="Portal",
    summary="A portal group: addresses that lead to the same targets. Its id is its portal group tag.",
    record=Portal,
    collection="portals",
    fields=(
        Field(
            attribute="tag",
            wire="iscsi_target_portal_tag",
            help_text="Group number for people; the lowest free one if not given.",
            required=False,
            nullable=True,
        ),
        Field(attribute="comment", wire="iscsi_target_portal_comment", help_text="For people."),
        Field(
            attribute="addresses",
            wire="iscsi_target_portal_ips",
            help_text="IP:PORT each, [v6]:PORT; without a port 3260. Replaced as a whole.",
            example=["0.0.0.0:3260"],
        ),
        Field(
            attribute="advertised",
            wire="iscsi_target_portal_advertised",
            help_text="HOST:PORT each, told to initiators in place of the addresses, where NAT is between. "
            "0.0.0.0 or [::] is the address they came to. Replaced as a whole; none = the addresses.",
            empty=(),
            example=["192.0.2.1:3260"],
        ),
        Field(
            attribute="redirect",
            wire="iscsi_target_portal_redirect",
            help_text="HOST:PORT where logins to any target are sent on to; empty = nowhere. A target's own "
            "redirection comes first.",
        ),
        Field(
            attribute="redirect_permanent",
            wire="iscsi_target_portal_redirect_permanent",
            help_text="True: initiators may remember it.",
        ),
        Field(
            attribute="discovery_auth_method",
            wire="iscsi_target_portal_discoveryauthmethod",
            help_text=f"For discovery through this portal, before the global setting: {_METHODS}.",
        ),
        Field(
            attribute="discovery_auth_group",
            wire="iscsi_target_portal_discoveryauthgroup",
            help_text="Tag of the credentials for discovery.",
        ),
        _status(
            "iscsi_target_portal_status",
            "ok, or which addresses are not listened on and why. One that this host has not got yet is "
            "taken when it comes.",
        ),
    ),
)

LUN_MAPPING: Final = Declaration(
    title="TargetToExtent",
    summary="An extent as a LUN of a target.",
    record=LunMapping,
    collection="lun_mappings",
    fields=(
        Field(attribute="target_id", wire="iscsi_target", help_text="id of the target."),
        Field(attribute="extent_id", wire="iscsi_extent", help_text="id of the extent."),
        Field(
            attribute="lun",
            wire="iscsi_lunid",
            help_text="LUN; the lowest free one of the target if not given.",
            required=False,
            nullable=True,
        ),
    ),
)

DECLARATIONS: Final = (
    GLOBAL_CONFIGURATION,
    EXTENT,
    INITIATOR_GROUP,
    AUTH_CREDENTIAL,
    TARGET,
    TARGET_GROUP,
    PORTAL,
    LUN_MAPPING,
)
