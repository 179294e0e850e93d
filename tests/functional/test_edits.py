"""What an edit of each field does to initiators that are logged in: a table, asked of the real daemon.

A row is one field and a value that is another than before. It is done beside a command under way, a
reservation, changed mode parameters and a medium whose removal is prevented, on a target with one LUN and
with two, with a second session on the target and a third that sees the same extent through another target.
The expectation is data: nothing, a unit attention (SPC-4 §5.14, SBC-3 §4.7), refused while in use, or the end
of the LUN.

A field of ``api/fields.py`` that is in no row fails a test.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from api.fields import DECLARATIONS, GLOBAL_CONFIGURATION
from protocol import bhs
from protocol.enums import AsyncEvent, ScsiStatus
from tests import cdbs
from tests.daemon import HOST, Daemon, free_ports
from tests.functional.sessions import BLOCK, attention, log_in
from tests.functional.test_cluster import KEY_1, REGISTER_AND_IGNORE, RESERVE, can_write, held, out
from tests.initiator import ConnectionClosed, SocketInitiator

Attention = tuple[int, int]
POWER_ON, MEDIUM_CHANGED, MODE_CHANGED = (0x29, 0x00), (0x28, 0x00), (0x2A, 0x01)
CAPACITY_CHANGED, LUNS_CHANGED, INQUIRY_CHANGED = (0x2A, 0x09), (0x3F, 0x0E), (0x3F, 0x03)
NO_UNIT, NO_MEDIUM, NO_BLOCK, PROTECTED = (0x25, 0x00), (0x3A, 0x00), (0x21, 0x00), (0x27, 0x00)
PREVENTED = (0x53, 0x02)
OTHER_UNIT = (POWER_ON, LUNS_CHANGED, MEDIUM_CHANGED, INQUIRY_CHANGED)

DATA = b"\x5a" * 64 * 1024
SECRET = ("user", "twelve-bytes-1")
WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5

Where = Literal["extent", "target", "everywhere"]


@dataclass(frozen=True)
class Row:
    """One edit and what it does. ``{…}`` in path and value is filled in by the site."""

    path: str
    wire: str
    value: Any
    told: tuple[Attention, ...] = ()
    """Unit attentions, each once to every nexus that it concerns."""
    where: Where = "extent"
    """Whom: those that see extent A, by whichever target; those of target T, by all its LUNs; both."""
    refused: bool = False
    """409 that names them while somebody is logged in; ``told`` is of the same by force."""
    under_way: Attention | None = None
    """How the write that waits for its data ends, in sense; None: GOOD."""
    third: bool = True
    """The other target's session is told, too, where ``where`` includes it."""
    besides: dict[str, Any] = field(default_factory=dict)
    """Fields that must be sent along."""
    forced: bool = True
    """It can be carried out here, by force."""
    never: bool = False
    """It is refused whoever is logged in, and by force."""

    def __str__(self) -> str:
        return f"{self.path.partition('/')[0]}.{self.wire}={self.value}"


def nothing(path: str, **fields: Any) -> list[Row]:
    """Edits that no session notices."""
    return [Row(path, wire, value) for wire, value in fields.items()]


EXTENT, TARGET, MAPPING = "extent/{extent}/", "target/{target}/", "targettoextent/{mapping}/"
GROUP, PORTAL = "targetgroup/{group}/", "portal/{portal}/"
INITIATORS, CREDENTIAL, GLOBALS = (
    "authorizedinitiator/{initiators}/",
    "authcredential/{user}/",
    "globalconfiguration/",
)
SERVICE = "/api/v1.0/services/services/iscsitarget/"

ROWS = [
    *nothing(
        EXTENT,
        iscsi_target_extent_name="renamed",
        iscsi_target_extent_comment="for people",
        iscsi_target_extent_insecure_tpc=False,
        iscsi_target_extent_iops_limit=100000,
        iscsi_target_extent_bandwidth_limit=10**12,
    ),
    Row(EXTENT, "iscsi_target_extent_serial", "EDITED", (INQUIRY_CHANGED,)),
    Row(
        *(EXTENT, "iscsi_target_extent_naa", "0x6025447000000000000000000000abcd"),
        refused=True,
        forced=False,
        never=True,
    ),
    Row(EXTENT, "iscsi_target_extent_xen", True, (INQUIRY_CHANGED,)),
    Row(EXTENT, "iscsi_target_extent_rpm", "7200", (INQUIRY_CHANGED,)),
    Row(EXTENT, "iscsi_target_extent_allocate", True, (INQUIRY_CHANGED,)),
    Row(EXTENT, "iscsi_target_extent_avail_threshold", 1, (MODE_CHANGED, INQUIRY_CHANGED)),
    Row(EXTENT, "iscsi_target_extent_pblocksize", True, (CAPACITY_CHANGED,)),
    Row(EXTENT, "iscsi_target_extent_filesize", "4MB", (CAPACITY_CHANGED,)),
    Row(EXTENT, "iscsi_target_extent_ro", True, (MODE_CHANGED,), under_way=PROTECTED, third=False),
    Row(EXTENT, "iscsi_target_extent_removable", False, (INQUIRY_CHANGED,)),
    Row(EXTENT, "iscsi_target_extent_filesize", "1MB", (CAPACITY_CHANGED,), refused=True),
    Row(EXTENT, "iscsi_target_extent_blocksize", 4096, (CAPACITY_CHANGED,), refused=True, under_way=NO_BLOCK),
    Row(
        EXTENT,
        "iscsi_target_extent_path",
        "{other_path}",
        (MEDIUM_CHANGED,),
        refused=True,
        under_way=NO_MEDIUM,
    ),
    Row(
        *(EXTENT, "iscsi_target_extent_type", "Memory", (MEDIUM_CHANGED, INQUIRY_CHANGED)),
        refused=True,
        under_way=NO_MEDIUM,
    ),
    Row(
        *(EXTENT, "iscsi_target_extent_disk", "no-such-disk"),
        refused=True,
        besides={"iscsi_target_extent_type": "Disk", "iscsi_target_extent_filesize": "0"},
        forced=False,
    ),
    *nothing(
        TARGET,
        iscsi_target_alias="for people",
        iscsi_target_type="Disk",
        iscsi_target_portalgroup="{other_portal}",
        iscsi_target_initiatorgroup=None,
        iscsi_target_authtype="None",
        iscsi_target_authgroup="{other_tag}",
        iscsi_target_initialdigest="Header",
        iscsi_target_queue_depth=4,
        iscsi_target_mode="iscsi",
        iscsi_target_redirect="192.0.2.1:3260",
        iscsi_target_redirect_permanent=True,
        iscsi_target_error_recovery_level=2,
    ),
    Row(TARGET, "iscsi_target_name", "renamed", (INQUIRY_CHANGED,), "target"),
    Row(TARGET, "iscsi_target_serial", "EDITED", (INQUIRY_CHANGED,), "target"),
    Row(TARGET, "iscsi_target_flags", "ro", (MODE_CHANGED,), "target"),
    Row(
        *(TARGET, "iscsi_target_logical_blocksize", 4096, (CAPACITY_CHANGED,), "target"),
        refused=True,
        under_way=NO_BLOCK,
    ),
    *nothing(
        GROUP,
        iscsi_target="{third_target}",
        iscsi_target_portalgroup="{other_portal}",
        iscsi_target_initiatorgroup=None,
        iscsi_target_authtype="None",
        iscsi_target_authgroup="{other_tag}",
        iscsi_target_initialdigest="Header",
    ),
    *nothing(
        PORTAL,
        iscsi_target_portal_tag=77,
        iscsi_target_portal_comment="for people",
        iscsi_target_portal_ips=["{address}"],
        iscsi_target_portal_advertised=["192.0.2.1:3260"],
        iscsi_target_portal_redirect="192.0.2.1:3260",
        iscsi_target_portal_redirect_permanent=True,
        iscsi_target_portal_discoveryauthmethod="Auto",
        iscsi_target_portal_discoveryauthgroup="{tag}",
    ),
    *nothing(
        INITIATORS,
        iscsi_target_initiator_tag=77,
        iscsi_target_initiator_initiators="iqn.2003-01.org.example:nobody",
        iscsi_target_initiator_auth_network="192.0.2.0/24",
        iscsi_target_initiator_comment="for people",
    ),
    *nothing(
        CREDENTIAL,
        iscsi_target_auth_tag=78,
        iscsi_target_auth_user="another",
        iscsi_target_auth_secret="twelve-bytes-2",
    ),
    Row(
        CREDENTIAL,
        "iscsi_target_auth_peeruser",
        "peer",
        besides={"iscsi_target_auth_peersecret": "twelve-bytes-3"},
    ),
    Row(
        CREDENTIAL,
        "iscsi_target_auth_peersecret",
        "twelve-bytes-4",
        besides={"iscsi_target_auth_peeruser": "peer"},
    ),
    Row(GLOBALS, "iscsi_basename", "iqn.2020-01.org.example", (INQUIRY_CHANGED,), "everywhere"),
    Row(GLOBALS, "iscsi_pool_avail_threshold", 1, (MODE_CHANGED, INQUIRY_CHANGED), "everywhere"),
    *nothing(
        GLOBALS,
        iscsi_discoveryauthmethod="Auto",
        iscsi_discoveryauthgroup="{tag}",
        iscsi_chap_weakest="SHA256",
        iscsi_iotimeout=20,
        iscsi_nopinint=30,
        iscsi_maxsesh=3,
        iscsi_maxconnect=2,
        iscsi_r2t=1,
        iscsi_maxoutstandingr2t=1,
        iscsi_firstburst=1024,
        iscsi_maxburst=65536,
        iscsi_maxrecdata=8192,
        iscsi_defaultt2w=0,
        iscsi_defaultt2r=0,
        iscsi_lucip="127.0.0.2",
        iscsi_lucport=3299,
        iscsi_luc_authnetwork="192.0.2.0/24",
        iscsi_luc_authmethod="None",
        iscsi_luc_authgroup="{tag}",
        iscsi_isns_servers="",
    ),
    Row(
        *(GLOBALS, "iscsi_toggleluc", True),
        besides={"iscsi_luc_authmethod": "None", "iscsi_lucport": "{free_port}"},
    ),
]
"""Edits after which every session goes on at the LUNs that it has."""


@dataclass(frozen=True)
class Removal:
    """An edit that takes extent A from LUN 0 of target T, or ends the sessions."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    lun_0: tuple[Attention, ...] = (NO_UNIT,)
    """What LUN 0 says to the sessions of T, one command after the other."""
    others: tuple[Attention, ...] = (LUNS_CHANGED,)
    """What another LUN of T says, where there is one."""
    third: tuple[Attention, ...] = ()
    """What the other target says."""
    ends: bool = False
    """The sessions of T end after they were asked to log out."""

    def __str__(self) -> str:
        return f"{self.method} {self.path} {next(iter(self.body or {}), '')}".strip()


REMOVALS = [
    Removal("PUT", MAPPING, {"iscsi_extent": "{spare}"}, OTHER_UNIT, ()),
    Removal("PUT", MAPPING, {"iscsi_target": "{third_target}"}),
    Removal("DELETE", MAPPING),
    Removal("DELETE", EXTENT, third=(NO_UNIT,)),
    Removal("DELETE", TARGET, ends=True),
    Removal("PUT", SERVICE, {"srv_enable": False}, ends=True),
]
RENUMBERED = Row(MAPPING, "iscsi_lunid", 7, (LUNS_CHANGED,))
KEEPING = [GROUP, PORTAL, INITIATORS, CREDENTIAL]
"""Objects whose deletion leaves sessions alone: access is asked of logins."""


def test_every_writable_field_is_in_the_table() -> None:
    tested = {(row.path.partition("/")[0], row.wire) for row in (*ROWS, RENUMBERED)}
    tested |= {(each.path.partition("/")[0], wire) for each in REMOVALS for wire in each.body or {}}
    names = {
        "extents": "extent",
        "targets": "target",
        "target_groups": "targetgroup",
        "lun_mappings": "targettoextent",
        "portals": "portal",
        "initiator_groups": "authorizedinitiator",
        "credentials": "authcredential",
        GLOBAL_CONFIGURATION.collection: "globalconfiguration",
    }
    writable = {
        (names[declaration.collection], column.wire)
        for declaration in DECLARATIONS
        for column in declaration.columns
        if not column.read_only
    }
    assert writable - tested == set()


# -- the site -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How a target is in use."""

    holding: Literal["RESERVE", "PR"]
    luns: int
    workers: int = 1

    def __str__(self) -> str:
        return f"{self.holding}, {self.luns} LUNs, {self.workers} workers"


VARIANTS = [
    Variant("RESERVE", 1),
    Variant("PR", 1),
    Variant("RESERVE", 2),
    Variant("PR", 2),
    Variant("PR", 2, workers=2),
]


class Site:
    """Target T with extent A at LUN 0 (and B at LUN 3), T2 with A, three sessions that use them."""

    def __init__(self, daemon: Daemon, variant: Variant, number: int) -> None:
        self.daemon = daemon
        self.variant = variant
        self.broken = False
        self.names: dict[str, Any] = {}
        (port, other_port, spare_port, luc_port) = free_ports(4)
        self.port = port
        made = self.names
        made["tag"], made["other_tag"] = 100 + 2 * number, 101 + 2 * number
        made["address"], made["free_port"] = f"{HOST}:{spare_port}", luc_port
        create = daemon.create
        for tag, name in (("tag", "user"), ("other_tag", "other_user")):
            made[name] = create(
                "authcredential",
                iscsi_target_auth_tag=made[tag],
                iscsi_target_auth_user=SECRET[0],
                iscsi_target_auth_secret=SECRET[1],
            )["id"]
        made["portal"] = create("portal", iscsi_target_portal_ips=[f"{HOST}:{port}"])["id"]
        made["other_portal"] = create("portal", iscsi_target_portal_ips=[f"{HOST}:{other_port}"])["id"]
        made["initiators"] = create("authorizedinitiator")["id"]
        targets = [f"t{number}", f"u{number}", f"v{number}"]
        made["target"], made["second_target"], made["third_target"] = (
            create("target", iscsi_target_name=name, iscsi_target_flags=flags)["id"]
            for name, flags in zip(targets, ("rw", "ro", "rw"), strict=True)
        )
        groups = [self._grant(made[name]) for name in ("target", "second_target")]
        made["group"] = groups[0]
        self.paths: list[Path] = []
        for name, removable in (("extent", True), ("second", False), ("spare", False)):
            path = daemon.extent_root / f"{name}{number}.img"
            self.paths.append(path)
            made[name] = create(
                "extent",
                iscsi_target_extent_name=f"{name}{number}",
                iscsi_target_extent_type="File",
                iscsi_target_extent_path=str(path),
                iscsi_target_extent_filesize="2MB",
                iscsi_target_extent_removable=removable,
            )["id"]
        made["other_path"] = str(daemon.extent_root / f"other{number}.img")
        Path(made["other_path"]).write_bytes(b"\x99" * (2 << 20))
        made["mapping"] = self._map("target", "extent", 0)
        if variant.luns > 1:
            self._map("target", "second", 3)
        self._map("second_target", "extent", 0)
        self.iqns = [daemon.full_name(name) for name in targets]
        self.one, self.two, self.three = (
            self._log_in(self.iqns[at], name) for at, name in ((0, "one"), (0, "two"), (1, "three"))
        )
        self.luns = (0, 3)[: variant.luns]
        self._hold()
        self.drain()

    def _map(self, target: str, extent: str, lun: int) -> int:
        fields = {"iscsi_target": self.names[target], "iscsi_extent": self.names[extent], "iscsi_lunid": lun}
        return int(self.daemon.create("targettoextent", **fields)["id"])

    def _grant(self, target: int) -> int:
        made = self.daemon.create(
            "targetgroup",
            iscsi_target=target,
            iscsi_target_portalgroup=self.names["portal"],
            iscsi_target_initiatorgroup=self.names["initiators"],
            iscsi_target_authtype="CHAP",
            iscsi_target_authgroup=self.names["tag"],
        )
        return int(made["id"])

    def _log_in(self, iqn: str, name: str) -> SocketInitiator:
        initiator = SocketInitiator((HOST, self.port))
        initiator.login(iqn, f"iqn.2003-01.org.example:{name}", chap=SECRET)
        initiator.answer_r2ts = False
        return initiator

    @property
    def sessions(self) -> tuple[SocketInitiator, ...]:
        return self.one, self.two, self.three

    def _hold(self) -> None:
        """The reservation of ``one``, mode parameters that are not the default, no removal."""
        one = self.one
        self.drain()
        assert one.command(cdbs.prevent_allow(1)).good
        page = one.command(cdbs.mode_sense6(0x08, 64), read=64).data[-20:]
        data = bytes(4) + bytes((page[0] & 0x3F, page[1], page[2] & ~0x04)) + page[3:]
        assert one.command(cdbs.mode_select6(len(data)), data).good
        if self.variant.holding == "RESERVE":
            assert one.command(cdbs.reserve6()).good
        else:
            assert out(one, REGISTER_AND_IGNORE, new_key=KEY_1).good
            assert out(one, RESERVE, KEY_1, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY).good

    def told(self, initiator: SocketInitiator, lun: int = 0) -> tuple[Attention, ...]:
        """All that commands report before one is carried out, or meets the reservation; or that there is no
        unit."""
        found: list[Attention] = []
        while (said := attention(initiator, lun)) is not None:
            found.append(said)
            if said == NO_UNIT:
                break
            assert len(found) < 10, found
        return tuple(found)

    def drain(self) -> None:
        for initiator in (self.one, self.two):
            for lun in self.luns:
                self.told(initiator, lun)
        self.told(self.three)

    def check_held(self, removable: bool = True) -> None:
        """What was set up is there still."""
        if self.variant.holding == "RESERVE":
            for other in (self.two, self.three):
                assert other.command(cdbs.read10(0, 1), read=BLOCK).status == ScsiStatus.RESERVATION_CONFLICT
        else:
            assert held(self.one) == (KEY_1, WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
            status = self.two.command(cdbs.write10(0, 1), bytes(BLOCK), immediate_data=BLOCK).status
            assert status == ScsiStatus.RESERVATION_CONFLICT
        page = self.one.command(cdbs.mode_sense6(0x08, 64), read=64).data[-20:]
        assert page[2] & 0x04 == 0, "WCE is as it was set"
        if removable:
            eject = self.one.command(cdbs.start_stop_unit(start=False, load_eject=True))
            assert eject.additional_sense == PREVENTED

    def edit(self, method: str, path: str, body: dict[str, Any] | None, query: str = "") -> Any:
        place = path.format(**self.names)
        if not place.startswith("/"):
            place = f"services/iscsi/{place}"
        return self.daemon.api(method, place + query, body)

    def filled(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.filled(each) for each in value]
        if isinstance(value, str) and value.startswith("{"):
            return self.names[value[1:-1]]
        return value

    def begin_write(self) -> tuple[Any, Any]:
        task = self.one.send_command(
            cdbs.write10(0, len(DATA) // BLOCK), DATA, unsolicited=0, immediate_data=0
        )
        return task, self.one.wait_for_r2t(task)

    def end_write(self, begun: tuple[Any, Any]) -> Attention | None:
        task, r2t = begun
        while r2t is not None:
            self.one.answer_r2t(task, r2t)
            r2t = self.one.wait_for_r2t(task) if not task.done and len(DATA) > 262144 else None
        reply = self.one.wait(task)
        assert reply.status in (ScsiStatus.GOOD, ScsiStatus.CHECK_CONDITION)
        return reply.additional_sense

    def remove(self) -> None:
        """Everything of it, so that another may be made."""
        for initiator in self.sessions:
            with contextlib.suppress(OSError, ConnectionClosed):
                initiator.close()
        self.daemon.api("PUT", SERVICE, {"srv_enable": True})
        for name in ("target", "second_target", "third_target"):
            self.edit("DELETE", f"target/{{{name}}}/", None)
        for name in ("extent", "second", "spare"):
            self.edit("DELETE", f"extent/{{{name}}}/", {"delete": True})
        for name in ("portal", "other_portal"):
            self.edit("DELETE", f"portal/{{{name}}}/", None)
        for name in ("user", "other_user"):
            self.edit("DELETE", f"authcredential/{{{name}}}/", None)
        self.edit("DELETE", INITIATORS, None)


class Sites:
    """The site of a variant, made anew where a test has left none."""

    def __init__(self, daemon: Daemon, variant: Variant) -> None:
        self.daemon = daemon
        self.variant = variant
        self.current: Site | None = None
        self.number = 0

    def get(self) -> Site:
        if self.current is not None and self.current.broken:
            self.current.remove()
            self.current = None
        if self.current is None:
            self.number += 1
            self.current = Site(self.daemon, self.variant, self.number)
        self.current.broken = True  # unless the test comes to its end
        return self.current


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def sites(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    variant: Variant = request.param
    daemon = Daemon(tmp_path_factory.mktemp("edits"), options=("--workers", str(variant.workers)))
    try:
        yield Sites(daemon.start(), variant)
        assert daemon.alive()
        assert not daemon.tracebacks()
    finally:
        daemon.kill9()


# -- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*ROWS, RENUMBERED], ids=str)
def test_an_edit_does_to_sessions_what_the_table_says(sites: Sites, row: Row) -> None:
    site = sites.get()
    before = site.edit("GET", row.path, None).json
    wanted = {row.wire: site.filled(row.value), **{name: site.filled(v) for name, v in row.besides.items()}}
    begun = site.begin_write()
    if row.refused:
        refusal = site.edit("PUT", row.path, wanted)
        assert refusal.status == 409, refusal.text
        (message,) = refusal.json[row.wire if row.wire in refusal.json else "iscsi_target_extent_type"]
        names: tuple[str, ...] = ("one", "two") if row.where == "target" else ("one", "two", "three")
        names = () if row.never else names
        assert all(f"iqn.2003-01.org.example:{name}" in message for name in names), message
        if row.never:
            assert site.edit("PUT", row.path, wanted, "?force=1").status == 409
        assert site.edit("GET", row.path, None).json == before
    if row.forced:
        reply = site.edit("PUT", row.path, wanted, "?force=1" if row.refused else "")
        assert reply.status == 202, reply.text
    assert site.end_write(begun) == row.under_way
    moved = {0: 7} if row is RENUMBERED else {}
    for initiator in (site.one, site.two):
        for lun in site.luns:
            concerned = lun == 0 or row.where != "extent"
            expected = row.told if concerned and row.forced else ()
            assert site.told(initiator, moved.get(lun, lun)) == expected, (initiator.initiator_name, lun)
    concerned = row.where != "target" and row.third and row is not RENUMBERED
    assert site.told(site.three) == (row.told if concerned else ())
    if row is not RENUMBERED:
        site.check_held(removable=row.wire != "iscsi_target_extent_removable")
    if row.forced:
        back = {name: before[name] for name in wanted if name in before}
        if row.wire == "iscsi_target_extent_type":
            back["iscsi_target_extent_path"] = before["iscsi_target_extent_path"]
        reply = site.edit("PUT", row.path, back, "?force=1" if row.path in (EXTENT, TARGET) else "")
        assert reply.status == 202, reply.text
    site.drain()
    if row.wire == "iscsi_target_extent_removable":
        assert site.one.command(cdbs.prevent_allow(1)).good
    site.check_held()
    assert not site.one.asyncs or row is RENUMBERED
    site.one.asyncs.clear()
    site.broken = row.wire in ("iscsi_target_portal_ips",)


@pytest.mark.parametrize("path", KEEPING)
def test_who_is_logged_in_stays_when_what_let_it_in_goes(sites: Sites, path: str) -> None:
    site = sites.get()
    begun = site.begin_write()
    assert site.edit("DELETE", path, None).status == 204
    assert site.end_write(begun) is None
    site.check_held()
    assert not site.one.asyncs


@pytest.mark.parametrize("removal", REMOVALS, ids=str)
def test_what_takes_a_lun_away_answers_and_tells(sites: Sites, removal: Removal) -> None:
    """A command under way ends with LOGICAL UNIT NOT SUPPORTED, or the session after its notice; no byte of
    it is written anywhere."""
    site = sites.get()
    site.one.command(cdbs.write10(0, 1), bytes(BLOCK), immediate_data=BLOCK)
    begun = site.begin_write()
    contents = [path.read_bytes() for path in site.paths]
    body = {name: site.filled(value) for name, value in (removal.body or {}).items()} or None
    reply = site.edit(removal.method, removal.path, body)
    assert reply.status in (200, 202, 204), reply.text
    if removal.ends:
        with contextlib.suppress(ConnectionClosed, OSError):
            assert site.end_write(begun) == NO_UNIT
        told = [*site.one.asyncs, *site.one.wait_closed()]
        events = [pdu.expect(bhs.AsyncMessage).async_event for pdu in told]
        assert events[-2:] == [AsyncEvent.LOGOUT_REQUEST, AsyncEvent.SESSION_DROP]
    else:
        assert site.end_write(begun) == NO_UNIT
        for initiator in (site.one, site.two):
            assert site.told(initiator) == removal.lun_0
            for lun in site.luns[1:]:
                assert site.told(initiator, lun) == removal.others
        assert site.told(site.three) == removal.third
    assert [path.read_bytes() for path in site.paths if path.exists()] == contents


@pytest.mark.parametrize("how", ["name", "basename"])
def test_a_renamed_target_keeps_sessions_and_registrations(daemon: Daemon, how: str) -> None:
    """Who registered is the same nexus by the new name: in its session, after another login and a restart."""
    disk = daemon.create_disk("before", "1MB")
    isid = b"\x80\x00\x00\x05\x00\x00"
    other = log_in(daemon, disk.iqn, "other")
    one = log_in(daemon, disk.iqn, "one", isid=isid)
    assert out(one, REGISTER_AND_IGNORE, new_key=KEY_1, aptpl=True).good
    assert out(one, RESERVE, KEY_1, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY).good
    if how == "name":
        name = daemon.full_name("after")
        daemon.expect(202, "PUT", f"services/iscsi/target/{disk.target_id}/", {"iscsi_target_name": "after"})
    else:
        name = "iqn.2020-01.org.example:before"
        path = "services/iscsi/globalconfiguration/"
        daemon.expect(202, "PUT", path, {"iscsi_basename": "iqn.2020-01.org.example"})
    for initiator in (one, other):
        assert attention(initiator) == INQUIRY_CHANGED
        assert name.encode() in initiator.command(cdbs.inquiry(0x83, 1024), read=1024).data
    shown = daemon.expect(200, "GET", "services/iscsi/session/")
    assert {session["target_name"] for session in shown} == {name}
    assert can_write(one) and not can_write(other)
    again = log_in(daemon, name, "one", isid=isid)
    one.wait_closed()
    assert len(daemon.expect(200, "GET", "services/iscsi/session/")) == 2, "it is the same session again"
    assert can_write(again) and not can_write(other)
    again.close()
    other.close()
    daemon.restart()
    with log_in(daemon, name, "one", isid=isid) as again, log_in(daemon, name, "other") as other:
        assert can_write(again) and not can_write(other)
        assert held(again) == (KEY_1, WRITE_EXCLUSIVE_REGISTRANTS_ONLY)


@pytest.mark.parametrize("kind", ["ZFS Volume", "ZVOL", "Device"])
def test_a_path_that_the_new_type_cannot_have_is_refused_by_name(shared_daemon: Daemon, kind: str) -> None:
    disk = shared_daemon.create_disk(f"not-{kind.replace(' ', '-')}".lower(), "1MB")
    path = f"services/iscsi/extent/{disk.extent_id}/"
    before = shared_daemon.expect(200, "GET", path)
    changed = {"iscsi_target_extent_type": kind, "iscsi_target_extent_path": "/mnt/tank/iscsi"}
    assert set(shared_daemon.expect(409, "PUT", path, changed)) == {"iscsi_target_extent_path"}
    assert shared_daemon.expect(200, "GET", path) == before
