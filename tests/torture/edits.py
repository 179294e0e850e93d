"""An administrator of the torture: the objects of a place, and every edit of the table done to them while
hosts use them, each taken back after a moment.

The edits are those of ``tests/functional/test_edits.py``, which says of each what it does to a session; here
they come while data is written, read and compared.
"""

import http.client
import random
import time
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

from api.fields import DECLARATIONS, GLOBAL_CONFIGURATION
from tests.daemon import HOST, Daemon, Reply, free_ports
from tests.functional.test_edits import (
    EXTENT,
    GLOBALS,
    KEEPING,
    REMOVALS,
    RENUMBERED,
    ROWS,
    SECRET,
    SERVICE,
    TARGET,
    Removal,
    Row,
)
from tests.torture.host import LABEL_AT, label

__all__ = ["REFUSED_IN_USE", "Place"]

SIZE = 2 << 20
"""Bytes of a medium as it is when nothing is edited."""
REFUSED_IN_USE = "refused, as it is in use"
START_LIMIT_S = 300.0
SETTLE_LIMIT_S = 60.0
WRITABLE = {
    declaration.collection: frozenset(column.wire for column in declaration.columns if not column.read_only)
    for declaration in DECLARATIONS
}
COLLECTIONS = {
    "extent": "extents", "target": "targets", "targetgroup": "target_groups", "portal": "portals",
    "targettoextent": "lun_mappings", "authorizedinitiator": "initiator_groups",
    "authcredential": "credentials", "globalconfiguration": GLOBAL_CONFIGURATION.collection,
}  # fmt: skip
Object = tuple[str, str, dict[str, Any], tuple[str, ...]]
"""Name, resource, fields with ``{…}`` filled in by ``Place.filled``, and the fields it is known by."""


def _objects(number: int, ports: list[int], paths: dict[str, Path]) -> list[Object]:
    """In the order in which they can be made."""
    name, user = (
        "iscsi_target_name",
        {"iscsi_target_auth_user": SECRET[0], "iscsi_target_auth_secret": SECRET[1]},
    )
    made: list[Object] = [
        (
            each,
            "authcredential",
            {"iscsi_target_auth_tag": "{" + tag + "}", **user},
            ("iscsi_target_auth_tag",),
        )
        for each, tag in (("user", "tag"), ("other_user", "other_tag"))
    ]
    made += [
        (each, "portal", {"iscsi_target_portal_ips": [f"{HOST}:{port}"]}, ("iscsi_target_portal_ips",))
        for each, port in zip(("portal", "other_portal"), ports, strict=False)
    ]
    comment = "iscsi_target_initiator_comment"
    made.append(("initiators", "authorizedinitiator", {comment: f"place {number}"}, (comment,)))
    for each, short, flags in (
        ("target", "t", "rw"), ("second_target", "u", "ro"), ("third_target", "v", "rw"),
    ):  # fmt: skip
        fields = {
            name: f"{short}{number}",
            "iscsi_target_flags": flags,
            "iscsi_target_error_recovery_level": 2,
        }
        made.append((each, "target", fields, (name,)))
    for each, target in (("group", "target"), ("second_group", "second_target")):
        fields = {
            "iscsi_target": "{" + target + "}",
            "iscsi_target_portalgroup": "{portal}",
            "iscsi_target_initiatorgroup": "{initiators}",
            "iscsi_target_authtype": "CHAP",
            "iscsi_target_authgroup": "{tag}",
        }
        made.append((each, "targetgroup", fields, ("iscsi_target",)))
    for each in ("extent", "spare"):
        fields = {
            "iscsi_target_extent_name": f"{each}{number}",
            "iscsi_target_extent_type": "File",
            "iscsi_target_extent_path": str(paths[each]),
            "iscsi_target_extent_filesize": f"{SIZE >> 20}MB",
            "iscsi_target_extent_removable": True,
        }
        made.append((each, "extent", fields, ("iscsi_target_extent_path",)))
    for each, target in (("mapping", "target"), ("second_mapping", "second_target")):
        fields = {"iscsi_target": "{" + target + "}", "iscsi_extent": "{extent}", "iscsi_lunid": 0}
        made.append((each, "targettoextent", fields, ("iscsi_target", "iscsi_extent")))
    return made


class Place:
    """A target for hosts, another that shows its extent, a third, two extents, three media; and what is done
    to them.

    Args:
        everywhere: this administrator edits the global configuration and the service, too.
        up: set while there is a daemon; whoever finds none waits for it.
    """

    def __init__(
        self, daemon: Daemon, number: int, source: random.Random, *, everywhere: bool, up: Event
    ) -> None:
        self.daemon = daemon
        self.number = number
        self.source = source
        self.up = up
        self.done: Counter[str] = Counter()
        self.kills_survived = 0
        """Times that the daemon was killed between two requests, and had all that was answered."""
        self.last_medium = number * 1_000_000
        self.media: dict[Path, int] = {}
        """Which medium is in each file."""
        ports = free_ports(4)
        self.port = ports[0]
        self.paths = {
            each: daemon.extent_root / f"{each}{number}.img" for each in ("extent", "spare", "other")
        }
        for path in self.paths.values():
            self._new_medium(path)
        self.names: dict[str, Any] = {
            "tag": 100 + 2 * number, "other_tag": 101 + 2 * number, "address": f"{HOST}:{ports[2]}",
            "free_port": ports[3], "other_path": str(self.paths["other"]),
        }  # fmt: skip
        self.objects = _objects(number, ports, self.paths)
        self.pending = False
        """Since ``answered`` something was asked for."""
        self.originals: dict[str, dict[str, Any]] = {}
        """Objects as they are when nothing is edited."""
        if everywhere:
            self.names["globals"] = 0
            self.objects.append(("globals", "globalconfiguration", {"iscsi_maxsesh": 200}, ()))
        every: list[Row | Removal | str] = [*ROWS, RENUMBERED, *REMOVALS, *KEEPING]
        self.edits = [
            edit
            for edit in every
            if everywhere or (edit if isinstance(edit, str) else edit.path) not in (GLOBALS, SERVICE)
        ]
        self.everywhere = everywhere
        self.restore()
        self._settled()
        self.iqn = daemon.full_name(f"t{number}")

    def _new_medium(self, path: Path) -> None:
        self.last_medium += 1
        medium = self.media[path] = self.last_medium
        content = bytearray(SIZE)
        unit = label(medium)
        content[LABEL_AT : LABEL_AT + len(unit)] = unit
        path.write_bytes(content)

    # -- requests ---------------------------------------------------------------------------------

    def _ask(self, method: str, place: str, body: Any = None, query: str = "") -> Reply:
        if not place.startswith("/"):
            place = f"services/iscsi/{place}"
        self.pending = self.pending or method != "GET"
        reply = self.daemon.api(method, place + query, body)
        assert reply.status < 500 or reply.status == 503, f"{method} {place} {body}: {reply.text}"
        return reply

    def filled(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.filled(each) for each in value]
        if isinstance(value, str) and value.startswith("{"):
            return self.names[value[1:-1]]
        return value

    def _url(self, name: str, resource: str) -> str:
        return (
            f"{resource}/" if resource == "globalconfiguration" else f"{resource}/{self.names.get(name, 0)}/"
        )

    def _look(self) -> dict[str, dict[str, Any] | None]:
        """Every object of ours as it is now; None: there is none."""
        lists = {resource: self._list(resource) for resource in {each[1] for each in self.objects}}
        return {
            name: self._find(name, lists[resource], known_by, fields)
            for name, resource, fields, known_by in self.objects
        }

    def _list(self, resource: str) -> list[dict[str, Any]]:
        reply = self._ask("GET", f"{resource}/?limit=0")
        assert reply.status == 200, reply
        found = reply.json
        return found if isinstance(found, list) else [found]

    def _find(
        self,
        name: str,
        among: list[dict[str, Any]],
        known_by: tuple[str, ...],
        fields: dict[str, Any],
    ) -> dict[str, Any] | None:
        """By its id, or as somebody made it whose answer was lost."""
        if not known_by:
            return among[0]
        if name in self.names:
            for shown in among:
                if shown["id"] == self.names[name]:
                    return shown
        try:
            wanted = {wire: self.filled(fields[wire]) for wire in known_by}
        except KeyError:
            return None  # what it belongs to is not there either
        return next((each for each in among if all(each[k] == v for k, v in wanted.items())), None)

    # -- edits ------------------------------------------------------------------------------------

    def run(self, stop: Event) -> None:
        """Edit after edit until told to stop; then everything is as it was."""
        while not stop.is_set():
            try:
                self._one(stop)
            except (OSError, http.client.HTTPException):
                self._after_a_kill()
        while True:
            try:
                self.restore()
                self._settled()
                return
            except (OSError, http.client.HTTPException):
                self._after_a_kill()

    def _one(self, stop: Event) -> None:
        edit = self.source.choice(self.edits)
        name = str(edit) if not isinstance(edit, str) else f"DELETE {edit}"
        if isinstance(edit, Row):
            done = self._put(edit)
        elif isinstance(edit, Removal):
            done = self._remove(edit)
        else:
            done = self._ask("DELETE", edit.format(**self.names)).status == 204
        self._settled()
        self.done[name if done else REFUSED_IN_USE] += 1
        stop.wait(self.source.choice((0.0, 0.01, 0.05, 0.2)))
        self.restore()
        self._settled()
        stop.wait(self.source.choice((0.0, 0.02, 0.1)))

    def _settled(self) -> None:
        self.answered = self._look()
        self.pending = False

    def _put(self, row: Row) -> bool:
        wanted = {row.wire: self.filled(row.value)}
        wanted |= {wire: self.filled(value) for wire, value in row.besides.items()}
        place = row.path.format(**self.names)
        reply = self._ask("PUT", place, wanted)
        if reply.status == 409 and row.refused and row.forced:
            self.done[REFUSED_IN_USE] += 1
            reply = self._ask("PUT", place, wanted, "?force=1")
        if reply.status == 202:
            for wire, value in wanted.items():
                assert reply.json[wire] == value or "secret" in wire, (row, reply.text)
            return True
        assert (reply.status in (409, 422) and not row.forced) or reply.status == 409, (str(row), reply.text)
        return False

    def _remove(self, removal: Removal) -> bool:
        body = {wire: self.filled(value) for wire, value in (removal.body or {}).items()} or None
        gone = removal.path == EXTENT and removal.method == "DELETE" and self.source.random() < 0.5
        reply = self._ask(
            removal.method, removal.path.format(**self.names), {"delete": True} if gone else body
        )
        assert reply.status in (200, 202, 204), (str(removal), reply.text)
        if gone:
            assert not self.paths["extent"].exists(), "delete: true has left the file"
        return True

    # -- back again -------------------------------------------------------------------------------

    def restore(self) -> None:
        """Every object as it was, or made again."""
        if self.everywhere and not self._ask("GET", SERVICE).json["srv_enable"]:
            assert self._ask("PUT", SERVICE, {"srv_enable": True}).status == 200
        found = self._look()
        for name, resource, fields, _ in self.objects:
            self._restore(name, resource, self._filled_all(fields), found[name])

    def _filled_all(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {wire: self.filled(value) for wire, value in fields.items()}

    def _restore(
        self, name: str, resource: str, fields: dict[str, Any], shown: dict[str, Any] | None
    ) -> None:
        path = self.paths.get(name) if resource == "extent" else None
        if path is not None and not path.exists():
            # Deleted with its file, or, where a kill came between, only one of both.
            if shown is not None:
                assert self._ask("DELETE", f"extent/{shown['id']}/").status == 204
                shown = None
            self._new_medium(path)
        if shown is None:
            reply = self._ask("POST", f"{resource}/", fields)
            assert reply.status == 201, f"{resource} {fields}: {reply.status} {reply.text}"
            shown = reply.json
            self.originals.pop(name, None)
        if resource != "globalconfiguration":
            self.names[name] = shown["id"]
        original = self.originals.setdefault(name, {**shown, **fields})
        original.update(fields)
        writable = WRITABLE[COLLECTIONS[resource]]
        back = {
            wire: original[wire]
            for wire, value in shown.items()
            if wire in writable
            and value != original[wire]
            and (wire in fields or not self._mirrored(name, wire))
        }
        if back:
            if "iscsi_target_extent_type" in back:
                back["iscsi_target_extent_path"] = original["iscsi_target_extent_path"]
            query = "?force=1" if resource in (EXTENT.partition("/")[0], TARGET.partition("/")[0]) else ""
            reply = self._ask("PUT", self._url(name, resource), back, query)
            assert reply.status == 202, f"back: {resource} {back}: {reply.status} {reply.text}"

    def _mirrored(self, name: str, wire: str) -> bool:
        """Fields of a target that are those of its first group."""
        return name.endswith("target") and wire in WRITABLE["target_groups"]

    def _after_a_kill(self) -> None:
        """What was answered must be there; what was not may be, or not."""
        if not self.up.wait(START_LIMIT_S):
            raise AssertionError(f"no daemon for {START_LIMIT_S} s")
        deadline = time.monotonic() + SETTLE_LIMIT_S
        while True:
            try:
                found = self._look()
                break
            except (OSError, http.client.HTTPException):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        if not self.pending:
            difference = self._difference(found)
            assert not difference, f"after a kill {difference}"
            self.kills_survived += 1
        self.pending = True  # until it is restored

    def _difference(self, after: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
        """What an administrator can set and is not as it was answered."""
        different = {}
        for name, resource, _, _ in self.objects:
            writable = WRITABLE[COLLECTIONS[resource]]
            before, now = (
                {wire: value for wire, value in (shown or {}).items() if wire in writable}
                for shown in (self.answered[name], after[name])
            )
            if before != now:
                different[name] = before, now
        return different
