"""``iscsi.*``: TrueNAS' names for the objects of API v1.0.

A ``Family`` is one kind of object: a table of fields (name here, wire name of v1.0, how a value is translated
both ways) and five methods that follow from it. What is valid is decided by the resources of v1.0.
"""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from api.errors import FieldsError, NotFoundError
from api.resources.authcredential import AuthCredentialResource
from api.resources.authorizedinitiator import AuthorizedInitiatorResource
from api.resources.collection import CollectionResource
from api.resources.extent import ExtentResource
from api.resources.globalconfiguration import GlobalConfigurationResource
from api.resources.portal import PortalResource
from api.resources.target import TargetResource
from api.resources.targettoextent import TargetToExtentResource
from api.v2.errors import CallError, fields_of
from api.v2.iscsi_requests import (
    AuthCreate,
    AuthUpdate,
    ExtentCreate,
    ExtentUpdate,
    GlobalUpdate,
    InitiatorUpdate,
    PortalCreate,
    PortalUpdate,
    TargetCreate,
    TargetExtentCreate,
    TargetExtentUpdate,
    TargetGroupEntry,
    TargetUpdate,
)
from api.v2.methods import Call, Method, Model, Parameter, reading, writing
from api.v2.query import PARAMETERS, QueryOptions, select
from targetd.config import (
    Configuration,
    TargetGroup,
    add,
    groups_by_target,
    next_id,
    objects,
    remove,
    split_address,
)
from targetd.interface import Engine
from targetd.system.threads import run_in_thread

__all__ = ["iscsi_methods"]

MASK: Final = "********"
LONG: Final = 100
"""More objects than this are shown on a thread: the event loop has others to serve."""

# -- fields -----------------------------------------------------------------------------------------


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Name:
    """One field: its name here and in v1.0, and the translation of its values."""

    ours: str
    wire: str
    out: Callable[[Any], Any] = _same
    into: Callable[[Any], Any] = _same


def _lines(values: Sequence[str]) -> str:
    return "\n".join(values)


def _words(text: str | None) -> list[str]:
    found = [word for word in (text or "").replace(",", " ").split() if word]
    return [] if [word.upper() for word in found] == ["ALL"] else found


def _disk(value: str) -> str:
    return value.removeprefix("/dev/")


EXTENT_NAMES: Final = tuple(
    Name(name, f"iscsi_target_extent_{name}", out, into)
    for name, out, into in (
        ("name", _same, _same),
        ("serial", _same, lambda value: value or ""),
        ("blocksize", _same, _same),
        ("pblocksize", _same, _same),
        ("avail_threshold", _same, _same),
        ("comment", _same, _same),
        ("insecure_tpc", _same, _same),
        ("xen", _same, _same),
        ("rpm", lambda value: value.upper(), lambda value: "Unknown" if value == "UNKNOWN" else value),
        ("ro", _same, _same),
        ("filesize", _same, str),
        ("path", _same, _same),
        ("disk", _same, _same),
        ("type", _same, lambda value: "Disk" if value == "DISK" else "File"),
    )
)
TARGET_NAMES: Final = (
    Name("name", "iscsi_target_name"),
    Name("alias", "iscsi_target_alias"),
)
TARGET_EXTENT_NAMES: Final = (
    Name("target", "iscsi_target"),
    Name("extent", "iscsi_extent"),
    Name("lunid", "iscsi_lunid"),
)
PORTAL_NAMES: Final = (
    Name("comment", "iscsi_target_portal_comment"),
    Name("listen", "iscsi_target_portal_ips"),
)
INITIATOR_NAMES: Final = (
    Name("initiators", "iscsi_target_initiator_initiators", _words, lambda value: _lines(value) or "ALL"),
    Name("auth_network", "iscsi_target_initiator_auth_network", _words, lambda value: _lines(value) or "ALL"),
    Name("comment", "iscsi_target_initiator_comment"),
)
AUTH_NAMES: Final = tuple(
    Name(name, f"iscsi_target_auth_{name}") for name in ("tag", "user", "secret", "peeruser", "peersecret")
)
GLOBAL_NAMES: Final = (
    Name("basename", "iscsi_basename"),
    Name("isns_servers", "iscsi_isns_servers", _words, _lines),
    Name("pool_avail_threshold", "iscsi_pool_avail_threshold"),
)


# -- families ---------------------------------------------------------------------------------------


class Family:
    """One kind of object, ``iscsi.<name>``: query, get_instance, create, update, delete."""

    name: str
    names: Sequence[Name]
    create_model: type[Model]
    update_model: type[Model]
    delete_parameters: tuple[Parameter, ...] = (Parameter("force", bool, False),)

    def __init__(self, engine: Engine, resource: CollectionResource) -> None:
        self.engine = engine
        self.resource = resource

    def show(self, config: Configuration, body: Mapping[str, Any]) -> dict[str, Any]:
        """An object, from its body in v1.0."""
        return {
            "id": body["id"],
            **{one.ours: one.out(body[one.wire]) for one in self.names if one.wire in body},
        }

    def wire(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The body in v1.0 of what a caller named."""
        return {one.wire: one.into(given[one.ours]) for one in self.names if one.ours in given}

    def argument(self, what: str) -> str:
        """``iscsi_target_create``."""
        return f"iscsi_{self.name}_{what}"

    def wrong(self, what: str, error: FieldsError) -> CallError:
        """Errors of v1.0 in the names of here."""
        names = {one.wire: one.ours for one in reversed(self.names)}
        return fields_of(self.argument(what), error.errors, names)

    async def _bodies(self) -> tuple[Configuration, list[dict[str, Any]]]:
        config = self.engine.configuration
        records = sorted(objects(config, self.resource.collection).values(), key=lambda record: record.id)
        return config, await self.resource.bodies(config, records)

    async def all(self, call: Call) -> list[dict[str, Any]]:
        """Every object."""
        config, bodies = await self._bodies()

        def work() -> list[dict[str, Any]]:
            return [self.masked(call, self.show(config, body)) for body in bodies]

        return await run_in_thread(work) if len(bodies) > LONG else work()

    def masked(self, call: Call, shown: dict[str, Any]) -> dict[str, Any]:
        """What this caller may see of it."""
        return shown

    async def query(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        return await run_in_thread(select, await self.all(call), filters, options)

    async def get_instance(self, call: Call, id: int, options: QueryOptions) -> Any:
        found = [one for one in await self.all(call) if one["id"] == id]
        if not found:
            raise CallError(f"{self.argument('id')}: {id} does not exist", errno.ENOENT)
        return select(found, [], options.model_copy(update={"get": True}))

    async def create(self, call: Call, model: Any) -> dict[str, Any]:
        try:
            config, record = await self.resource.write(None, self.wire(model.given()))
        except FieldsError as error:
            raise self.wrong("create", error) from None
        return await self._one(call, config, record)

    async def update(self, call: Call, id: int, model: Any) -> dict[str, Any]:
        try:
            config, record = await self.resource.write(id, self.wire(model.given()))
        except FieldsError as error:
            raise self.wrong("update", error) from None
        except NotFoundError:
            raise self._gone(id) from None
        return await self._one(call, config, record)

    async def _one(self, call: Call, config: Configuration, record: Any) -> dict[str, Any]:
        return self.masked(call, self.show(config, await self.resource.body(config, record)))

    def _gone(self, id: int) -> CallError:
        return CallError(f"iscsi.{self.name}: {id} does not exist", errno.ENOENT)

    async def delete(self, call: Call, id: int, *options: Any) -> bool:
        try:
            await self.resource.apply(self.resource.removal(id))
        except FieldsError as error:
            raise self.wrong("delete", error) from None
        except NotFoundError:
            raise self._gone(id) from None
        return True

    def methods(self) -> Iterator[Method]:
        """The five of them."""
        name, rest = f"iscsi.{self.name}", f"/iscsi/{self.name}"
        id = Parameter("id", int)
        yield reading(f"{name}.query", "List objects.", self.query, *PARAMETERS, rest=("GET", rest))
        yield reading(
            f"{name}.get_instance",
            "Show one object.",
            self.get_instance,
            id,
            PARAMETERS[1],
            rest=("GET", f"{rest}/id/{{id}}"),
        )
        yield writing(
            f"{name}.create",
            "Create an object; it is in force when this is answered.",
            self.create,
            Parameter(self.argument("create"), self.create_model),
            rest=("POST", rest),
        )
        yield writing(
            f"{name}.update",
            "Change the fields that are named.",
            self.update,
            id,
            Parameter(self.argument("update"), self.update_model),
            rest=("PUT", f"{rest}/id/{{id}}"),
        )
        yield writing(
            f"{name}.delete",
            "Delete an object, and what refers to it.",
            self.delete,
            id,
            *self.delete_parameters,
            rest=("DELETE", f"{rest}/id/{{id}}"),
        )


class Targets(Family):
    """Targets with their grants."""

    name = "target"
    names = TARGET_NAMES
    create_model = TargetCreate
    update_model = TargetUpdate
    delete_parameters = (Parameter("force", bool, False), Parameter("delete_extents", bool, False))

    METHODS: Final = {"NONE": "None", "CHAP": "CHAP", "CHAP_MUTUAL": "CHAP Mutual"}

    def show(self, config: Configuration, body: Mapping[str, Any]) -> dict[str, Any]:
        groups = sorted(groups_by_target(config).get(body["id"], ()), key=lambda group: group.id)
        return {**super().show(config, body), "mode": "ISCSI", "groups": [_group(group) for group in groups]}

    async def create(self, call: Call, model: TargetCreate) -> dict[str, Any]:
        body = self.wire(model.given())
        return await self._written(call, "create", None, body, model.groups)

    async def update(self, call: Call, id: int, model: TargetUpdate) -> dict[str, Any]:
        body = self.wire(model.given())
        groups = model.groups if "groups" in model.model_fields_set else None
        return await self._written(call, "update", id, body, groups)

    async def _written(
        self,
        call: Call,
        what: str,
        id: int | None,
        body: dict[str, Any],
        groups: list[TargetGroupEntry] | None,
    ) -> dict[str, Any]:
        def more(config: Configuration, made: int) -> Configuration:
            return config if groups is None else self._with_groups(config, made, groups)

        try:
            config, record = await self.resource.write(id, body, more)
        except FieldsError as error:
            raise self.wrong(what, error) from None
        except NotFoundError:
            raise self._gone(id or 0) from None
        return await self._one(call, config, record)

    def _with_groups(
        self, config: Configuration, target: int, wanted: list[TargetGroupEntry]
    ) -> Configuration:
        """The target with these grants; one that is there already is left as it is."""
        there = [group for group in config.target_groups.values() if group.target_id == target]
        entries = list(wanted)
        for group in there:
            entry = next((one for one in entries if _group(group) == one.model_dump()), None)
            if entry is None:
                config = remove(config, "target_groups", group.id)
            else:
                entries.remove(entry)
        for entry in entries:
            group = TargetGroup(
                id=next_id(config, "target_groups"),
                target_id=target,
                portal_id=entry.portal,
                initiator_group_id=entry.initiator,
                auth_method=self.METHODS[entry.authmethod],  # type: ignore[arg-type]  # the table's own values
                auth_group=entry.auth,
            )
            config = add(config, "target_groups", group)
        return config

    def wrong(self, what: str, error: FieldsError) -> CallError:
        names = {one.wire: one.ours for one in self.names}
        names |= dict.fromkeys(
            ("iscsi_target_portalgroup", "iscsi_target_initiatorgroup", "iscsi_target_authgroup"), "groups"
        )
        names["iscsi_target_authtype"] = "groups"
        return fields_of(self.argument(what), error.errors, names)

    async def delete(self, call: Call, id: int, *options: Any) -> bool:
        force, delete_extents = options
        config = self.engine.configuration
        extents = [one.extent_id for one in config.lun_mappings.values() if one.target_id == id]

        def edit(config: Configuration) -> Configuration:
            after = remove(config, "targets", self.resource.find(config, id).id)
            if delete_extents:
                kept = {one.extent_id for one in after.lun_mappings.values()}
                for extent in extents:
                    if extent in after.extents and extent not in kept:
                        after = remove(after, "extents", extent)
            return after

        await _not_in_use(self.engine, id, force)
        try:
            await self.resource.apply(edit)
        except FieldsError as error:
            raise self.wrong("delete", error) from None
        except NotFoundError:
            raise self._gone(id) from None
        return True


async def _not_in_use(engine: Engine, target: int, force: bool) -> None:
    """A target in use is not deleted without ``force``.

    Raises:
        CallError: EBUSY, with the initiators' names.
    """
    if not force:
        users = sorted({one.initiator_name for one in await engine.sessions() if one.target_id == target})
        if users:
            raise CallError(f"Target is in use by {', '.join(users[:5])}; use force", errno.EBUSY)


def _group(group: TargetGroup) -> dict[str, Any]:
    methods = {ours: name for name, ours in Targets.METHODS.items()}
    method = methods.get(group.auth_method) or ("CHAP" if group.auth_group else "NONE")
    return {
        "portal": group.portal_id,
        "initiator": group.initiator_group_id,
        "authmethod": method,
        "auth": group.auth_group,
    }


class Extents(Family):
    """Extents. ``remove`` deletes the file of a FILE extent too."""

    name = "extent"
    names = EXTENT_NAMES
    create_model = ExtentCreate
    update_model = ExtentUpdate
    delete_parameters = (Parameter("remove", bool, False), Parameter("force", bool, False))

    def show(self, config: Configuration, body: Mapping[str, Any]) -> dict[str, Any]:
        shown = super().show(config, body)
        record = config.extents[body["id"]]
        is_file = record.type in ("File", "Memory", "Null")
        disk = None if is_file else _disk(record.path)
        return {
            **shown,
            "type": "FILE" if is_file else "DISK",
            "path": record.path if is_file else disk,
            "disk": disk,
            "filesize": str(record.size_bytes),
            "naa": record.naa,
            "vendor": "TARGETD",
            "enabled": True,
            "locked": False,
        }

    def wire(self, given: Mapping[str, Any]) -> dict[str, Any]:
        body = super().wire({"type": "DISK", **given} if "name" in given and "disk" in given else given)
        if body.get("iscsi_target_extent_disk") is None:
            body.pop("iscsi_target_extent_disk", None)
        elif body.get("iscsi_target_extent_type") != "File":
            body.pop("iscsi_target_extent_path", None)  # clients send back what they read
        return body

    async def delete(self, call: Call, id: int, *options: Any) -> bool:
        discard, force = options
        config = self.engine.configuration
        targets = {one.target_id for one in config.lun_mappings.values() if one.extent_id == id}
        for target in targets:
            await _not_in_use(self.engine, target, force)
        try:
            await self.resource.apply(
                self.resource.removal(id), discard=frozenset({id}) if discard else frozenset()
            )
        except FieldsError as error:
            raise self.wrong("delete", error) from None
        except NotFoundError:
            raise self._gone(id) from None
        return True


class TargetExtents(Family):
    """LUNs."""

    name = "targetextent"
    names = TARGET_EXTENT_NAMES
    create_model = TargetExtentCreate
    update_model = TargetExtentUpdate

    async def delete(self, call: Call, id: int, *options: Any) -> bool:
        mapping = self.engine.configuration.lun_mappings.get(id)
        if mapping is not None:
            await _not_in_use(self.engine, mapping.target_id, options[0])
        return await super().delete(call, id, *options)


class Portals(Family):
    """Portal groups."""

    name = "portal"
    names = PORTAL_NAMES
    create_model = PortalCreate
    update_model = PortalUpdate
    delete_parameters = ()

    def show(self, config: Configuration, body: Mapping[str, Any]) -> dict[str, Any]:
        portal = config.portals[body["id"]]
        listen = [
            dict(zip(("ip", "port"), split_address(address), strict=True)) for address in portal.addresses
        ]
        return {"id": portal.id, "tag": portal.tag, "comment": portal.comment, "listen": listen}

    def wire(self, given: Mapping[str, Any]) -> dict[str, Any]:
        body = super().wire(given)
        if "listen" in given:
            body["iscsi_target_portal_ips"] = [
                f"[{one.ip}]:{one.port or self.port()}"
                if ":" in one.ip
                else f"{one.ip}:{one.port or self.port()}"
                for one in given["listen"]
            ]
        return body

    def port(self) -> int:
        """The port of a portal whose ``listen`` names none: that of the first portal."""
        return listen_port(self.engine.configuration)


def listen_port(config: Configuration) -> int:
    """The port that most of the service is on: the first portal's."""
    for _, portal in sorted(config.portals.items()):
        for address in portal.addresses:
            return split_address(address)[1]
    return 3260


class Initiators(Family):
    """Initiator groups: empty lists mean everybody."""

    name = "initiator"
    names = INITIATOR_NAMES
    create_model = InitiatorUpdate
    update_model = InitiatorUpdate
    delete_parameters = ()

    def show(self, config: Configuration, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().show(config, body), "tag": config.initiator_groups[body["id"]].tag}


class Credentials(Family):
    """CHAP users. Secrets are shown to accounts that may write, as TrueNAS does."""

    name = "auth"
    names = AUTH_NAMES
    create_model = AuthCreate
    update_model = AuthUpdate
    delete_parameters = ()

    def show(self, config: Configuration, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().show(config, body), "discovery_auth": "NONE"}

    def masked(self, call: Call, shown: dict[str, Any]) -> dict[str, Any]:
        account = call.caller.account
        if account is not None and not account.read_only:
            return shown
        return {**shown, **{name: MASK for name in ("secret", "peersecret") if shown[name]}}


FAMILIES: Final = (
    (Targets, TargetResource),
    (Extents, ExtentResource),
    (TargetExtents, TargetToExtentResource),
    (Portals, PortalResource),
    (Initiators, AuthorizedInitiatorResource),
    (Credentials, AuthCredentialResource),
)


class Globals:
    """``iscsi.global``: one object."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.resource = GlobalConfigurationResource(engine)

    async def config(self, call: Call) -> dict[str, Any]:
        globals = self.engine.configuration.globals
        return {
            "id": 1,
            "basename": globals.basename,
            "isns_servers": _words(globals.isns_servers),
            "pool_avail_threshold": globals.pool_avail_threshold,
            "alua": False,
            "iser": False,
            "listen_port": listen_port(self.engine.configuration),
        }

    async def update(self, call: Call, model: GlobalUpdate) -> dict[str, Any]:
        given = model.given()
        body = {one.wire: one.into(given[one.ours]) for one in GLOBAL_NAMES if one.ours in given}
        try:
            await self.resource.write(body)
        except FieldsError as error:
            names = {one.wire: one.ours for one in GLOBAL_NAMES}
            raise fields_of("iscsiglobal_update", error.errors, names) from None
        return await self.config(call)

    async def sessions(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        config = self.engine.configuration
        aliases = {target.id: target.alias for target in config.targets.values()}
        shown = []
        for one in await self.engine.sessions():
            negotiated, first = one.negotiated, one.connections[0] if one.connections else None
            shown.append(
                {
                    "initiator": one.initiator_name,
                    "initiator_addr": first.peer_address if first else "",
                    "initiator_alias": one.initiator_alias or None,
                    "target": one.target_name,
                    "target_alias": aliases.get(one.target_id) if one.target_id else None,
                    "header_digest": first.header_digest if first else None,
                    "data_digest": first.data_digest if first else None,
                    "max_data_segment_length": negotiated.get("MaxRecvDataSegmentLength"),
                    "max_burst_length": negotiated.get("MaxBurstLength"),
                    "first_burst_length": negotiated.get("FirstBurstLength"),
                    "immediate_data": negotiated.get("ImmediateData") in (True, "Yes"),
                    "iser": False,
                    "offload": False,
                }
            )
        return select(shown, filters, options)

    def methods(self) -> Iterator[Method]:
        """Three of them."""
        yield reading(
            "iscsi.global.config",
            "Show the settings of the service.",
            self.config,
            rest=("GET", "/iscsi/global"),
        )
        yield writing(
            "iscsi.global.update",
            "Change the settings that are named.",
            self.update,
            Parameter("iscsiglobal_update", GlobalUpdate),
            rest=("PUT", "/iscsi/global"),
        )
        yield reading(
            "iscsi.global.sessions",
            "List the sessions of initiators.",
            self.sessions,
            *PARAMETERS,
            rest=("GET", "/iscsi/global/sessions"),
        )


def iscsi_methods(engine: Engine) -> Iterator[Method]:
    """All of ``iscsi.*``."""
    for family, resource in FAMILIES:
        yield from family(engine, resource(engine)).methods()
    yield from Globals(engine).methods()
