"""``extent``: files and devices that can be logical units (api-semantics §5.2, §6).

The words for devices are many: ``Disk`` with ``disk: "zvol/pool/name"`` as FreeNAS had it, ``Device`` and
``ZFS Volume`` of the specification, ``ZVOL`` as it was returned. All of them end as one absolute path; the
word is kept as the client said it, except that a ``Disk`` on a zvol is shown as ``ZVOL``, by which clients
find theirs. A GET body can be PUT back unchanged.

Whether a file or device is there, and may be used, is for the engine to find out.
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from api.audit import note
from api.bodies import read_object
from api.errors import ApiError, FieldsError, answer
from api.fields import EXTENT
from api.resources.collection import CollectionResource, Draft, wants_discard
from api.resources.diagnosis import WORK_PATH
from api.routing import Operation, Router
from api.schema import ALL, coerce
from targetd.config import (
    REQUIRED,
    SIZED,
    VOLATILE,
    ConfigError,
    Configuration,
    Extent,
    extent_serial_given,
    make_extent_serial,
    make_naa,
    next_id,
    rules,
)
from targetd.interface import MAX_SANITIZE_PASSES, SANITIZE_METHODS
from targetd.system.pieces import gathered

__all__ = ["ExtentResource"]

ZVOLS = "/dev/zvol/"

NAA_STAYS = "It is {} for good: initiators know the disk by it. Make another extent to have another."
NOT_CLONED = "Only a File extent can be cloned."

INHERITED = tuple(
    name
    for name in rules(Extent)
    if name not in ("id", "name", "path", "naa", "serial", "serial_given", "allocate")
)
"""What a clone has of its source unless told otherwise; not ``allocate``: shared blocks are not its own."""


def device_path(word: str, given: str) -> str:
    """The device node meant by ``ada1``, ``zvol/pool/name``, ``/dev/…`` or a ZFS volume's ``pool/name``."""
    if given.startswith("/"):
        return given
    if given.startswith("dev/"):
        return f"/{given}"
    if word in ("ZVOL", "ZFS Volume") and not given.startswith("zvol/"):
        return ZVOLS + given
    return f"/dev/{given}"


def _place(word: str) -> str:
    """Types with one answer may have one path."""
    return word if word in SIZED else "device"


class ExtentResource(CollectionResource):
    """Extents. Deleting one takes its LUNs along; its file stays unless ``{"delete": true}`` is sent."""

    declaration = EXTENT
    name = "extent"
    forcible = True

    def order(self, record: Any) -> Any:
        return record.name

    def delete_operation(self) -> Operation:
        return Operation(
            self.delete,
            'Delete, with its LUNs; with {"delete": true} the file of a File extent too.',
            {204: None, 401: None, 404: None, 409: "FieldErrors"},
            "ExtentDelete",
        )

    def settle(self, draft: Draft, config: Configuration, stored: Extent | None) -> None:
        values, errors = draft.values, draft.errors
        disk, path, word = values.pop("disk", ""), values.pop("path", ""), values.get("type")
        by_wire = {attribute: column.wire for attribute, column in self.declaration.by_attribute.items()}
        if disk and not path:
            errors.pop(by_wire["path"], None)  # an empty one beside a disk is none
        if stored and not (disk or path or word):
            return
        known = word is not None or stored is not None
        if word is None:
            word = stored.type if stored else "File"
            # the new place of what is shown as ZVOL may be no zvol
            word = "Disk" if word == "ZVOL" else word
        if word in SIZED:
            given = path
            if disk:
                errors.setdefault(by_wire["disk"], [f"A {word} extent has no disk."])
            required = "path"
        else:
            given = device_path(word, disk or path) if disk or path else ""
            required = "disk" if word in ("Disk", "ZVOL") and known else "path"
            if disk:
                draft.renamed["path"] = "disk"
        # what is there stays, if it is of the same kind
        kept = stored.path if stored and _place(stored.type) == _place(word) else ""
        if word in VOLATILE and not (given or kept):
            given = f"/{word.lower()}/{secrets.token_hex(8)}"  # a name for what has no place
            errors.pop(by_wire["path"], None)
        if word == "Disk" and (given or kept).startswith(ZVOLS):
            word = "ZVOL"
        values["type"] = word
        if given:
            values["path"] = given
        elif not kept:
            if not errors.keys() & {by_wire["path"], by_wire["disk"]}:
                errors[by_wire[required]] = [REQUIRED]
            if stored is None:
                values["path"] = "/dev/null"  # for the trial run that looks for further errors

    def create(self, config: Configuration, id: int, values: Mapping[str, Any]) -> Configuration:
        naa = values.get("naa") or make_naa(secrets.randbits(100))
        serial = values.get("serial") or make_extent_serial(naa)
        given = extent_serial_given(naa, serial)
        return super().create(config, id, {**values, "naa": naa, "serial": serial, "serial_given": given})

    def update(self, config: Configuration, stored: Extent, values: Mapping[str, Any]) -> Configuration:
        if values.get("naa", stored.naa) not in ("", stored.naa):
            raise ConfigError.one("extents", "naa", NAA_STAYS.format(stored.naa), stored.id)
        serial = values.get("serial", stored.serial) or make_extent_serial(stored.naa)
        values = {**values, "naa": stored.naa, "serial": serial}
        if serial != stored.serial:
            values["serial_given"] = extent_serial_given(stored.naa, serial)
        return super().update(config, stored, values)

    def register(self, router: Router) -> None:
        super().register(router)
        title = self.declaration.title
        router.add(
            self.name,
            f"{self.path}{{id}}/clone/",
            {
                "POST": Operation(
                    self.clone,
                    "A new File extent that shares the blocks of this one; with ro it is a snapshot.",
                    {201: title, 400: "Error", 401: None, 404: None, 409: "FieldErrors"},
                    f"{title}Create",
                )
            },
        )

        failures: dict[int, str | None] = {400: "Error", 401: None, 404: None, 409: "FieldErrors"}
        router.add(
            self.name,
            f"{self.path}{{id}}/sanitize/",
            {
                "POST": Operation(
                    self.sanitize,
                    "Make everything on it unreadable, to the end; work/ tells how far that is.",
                    {202: "Work", **failures},
                    "Sanitize",
                )
            },
        )

        router.add(
            self.name,
            f"{self.path}{{id}}/adopt/",
            {
                "POST": Operation(
                    self.adopt,
                    "Take what is under its path now for its medium, in place of what was there; a shorter "
                    "file is grown. Its initiators learn that the medium may have changed.",
                    {200: title, **failures},
                )
            },
        )

    async def adopt(self, request: web.Request, id: int) -> web.StreamResponse:
        """POST of an adoption: the extent as it is then."""
        self.find(self.engine.configuration, id)
        if obstacle := await self.engine.adopt_medium(id):
            raise FieldsError({ALL: [obstacle]})
        note("adopt", id, None, {})
        return answer(
            200, await self.body(self.engine.configuration, self.find(self.engine.configuration, id))
        )

    async def sanitize(self, request: web.Request, id: int) -> web.StreamResponse:
        """POST of a sanitize: what there is to watch. No session may have the extent."""
        self.find(self.engine.configuration, id)
        body = await read_object(request)
        errors: dict[str, list[str]] = {}
        method, passes = body.get("method"), body.get("passes")
        if method is None:
            errors["method"] = [REQUIRED]
        elif not isinstance(method, str) or method not in SANITIZE_METHODS:
            errors["method"] = [f"One of: {', '.join(SANITIZE_METHODS)}."]
        try:
            count = 1 if passes in (None, "") else coerce(int, passes)
        except ValueError as error:
            errors["passes"] = [str(error)]
        else:
            if not 1 <= count <= MAX_SANITIZE_PASSES:
                errors["passes"] = [f"From 1 to {MAX_SANITIZE_PASSES}."]
            elif count > 1 and method != "overwrite":
                errors["passes"] = ["Only an overwrite has several passes."]
        if errors:
            raise FieldsError(errors)
        begun = await self.engine.sanitize(id, str(method), count)
        if isinstance(begun, str):
            raise FieldsError({ALL: [begun]})
        note("sanitize", id, None, {"method": method, "passes": count})
        return answer(
            202, dataclasses.asdict(begun), {"Location": f"{request.scheme}://{request.host}{WORK_PATH}"}
        )

    async def bodies(self, config: Configuration, records: Sequence[Any]) -> list[dict[str, Any]]:
        statuses = await self.engine.extent_statuses([record.id for record in records])
        return await gathered(
            self.declaration.render(record, status=statuses[record.id]) for record in records
        )

    async def clone(self, request: web.Request, id: int) -> web.StreamResponse:
        """POST of a clone: name and path of the new extent; other fields are the source's unless given."""
        source = self.find(self.engine.configuration, id)
        if source.type != "File":
            raise FieldsError({self.declaration.by_attribute["type"].wire: [NOT_CLONED]})
        draft = Draft(*self.declaration.read(await read_object(request), creating=True), creating=True)
        wires = {attribute: column.wire for attribute, column in self.declaration.by_attribute.items()}
        for attribute in ("type", "disk", "file_size"):
            draft.values.pop(attribute, None)
            draft.errors.pop(wires[attribute], None)
        if not draft.values.get("path"):
            draft.errors.setdefault(wires["path"], [REQUIRED])
            draft.values["path"] = "/dev/null"  # for the trial run that looks for further errors
        made = 0

        def edit(config: Configuration) -> Configuration:
            nonlocal made
            made = next_id(config, self.collection)
            kept = self.find(config, id)
            values = {name: getattr(kept, name) for name in INHERITED}
            return self.create(config, made, {**values, **draft.values})

        config = await self.carry_out(edit, draft, clone_of=id)
        location = f"{request.scheme}://{request.host}{self.path}{made}/"
        return answer(201, await self.body(config, self.find(config, made)), {"Location": location})

    async def delete(self, request: web.Request, id: int) -> web.StreamResponse:
        self.find(self.engine.configuration, id)
        try:
            body = await read_object(request) if request.can_read_body else {}
        except ApiError:
            body = {}  # never required, and whatever it is it does not ask for the file
        discard = frozenset({id}) if wants_discard(body) else frozenset()
        await self.apply(self.removal(id), discard=discard)
        return answer(204)
