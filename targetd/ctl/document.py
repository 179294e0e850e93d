"""The whole configuration as one TOML document: export, difference, import.

Objects are named in it by what they are called (an extent by its name, a portal by its tag), never by
id: ids are given by the daemon and differ from one to the next. So a document moves between daemons, and a
second import of it changes nothing.

A document is what should be. A field that it leaves out keeps its value; an object that it leaves out stays
too, unless deletion is asked for. What is wrong in it is found before anything is sent. An import is many
requests and therefore not atomic: when one fails it stops, what was done stays done, and importing again
goes on from there.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from api.schema import Column
from targetd.ctl.client import Client, CtlError, FieldsError
from targetd.ctl.output import MASK
from targetd.ctl.resources import BY_COLLECTION, GLOBALS, RESOURCES, Resource, field_name

__all__ = ["Step", "carry_out", "dumps", "export", "loads", "plan"]

FORMAT = 1
SERVICE_PATH = "services/services/iscsitarget/"
Key = tuple[object, ...]
Ids = dict[str, dict[int, Key]]
"""Resource → id → key, of what the daemon has."""


# -- Export -----------------------------------------------------------------------------------------


def export(client: Client, *, secrets: bool = True) -> dict[str, Any]:
    """The document of what the daemon has. It holds the CHAP secrets unless ``secrets`` is False."""
    current = _fetch(client)
    ids = _ids(current)
    document: dict[str, Any] = {
        "format": FORMAT,
        "service": {"enabled": bool(client.request("GET", SERVICE_PATH)["srv_enable"])},
        GLOBALS.name: _show(GLOBALS, client.request("GET", f"{GLOBALS.path}/"), ids, secrets),
    }
    for resource in RESOURCES:
        document[resource.name] = [_show(resource, shown, ids, secrets) for shown in current[resource.name]]
    return document


def _fetch(client: Client) -> dict[str, list[dict[str, Any]]]:
    return {resource.name: client.all(resource.path) for resource in RESOURCES}


def _ids(current: Mapping[str, list[dict[str, Any]]]) -> Ids:
    ids: Ids = {}
    for resource in RESOURCES:  # each after those it refers to
        ids[resource.name] = {shown["id"]: _key(resource, shown, ids) for shown in current[resource.name]}
    return ids


def _key(resource: Resource, shown: Mapping[str, Any], ids: Ids) -> Key:
    columns = (resource.declaration.by_attribute[attribute] for attribute in resource.key)
    return tuple(_named(column, shown[column.wire], ids) for column in columns)


def _named(column: Column, value: Any, ids: Ids) -> Any:
    """The value as in the document: what is referred to, by its key."""
    if column.rule.reference is None or value is None:
        return value
    resource = BY_COLLECTION[column.rule.reference.collection]
    (name,) = ids[resource.name][value]
    return name


def _show(resource: Resource, shown: Mapping[str, Any], ids: Ids, secrets: bool) -> dict[str, Any]:
    values = {}
    for column in resource.own:
        if column.secret and (not secrets or shown[column.wire] == MASK):
            continue  # a read-only user is not told either; an import leaves what the document leaves out
        value = _named(column, shown[column.wire], ids)
        # TOML has no null. The empty text means it here as it does in the API.
        values[field_name(column)] = "" if value is None else value
    return values


def dumps(document: Mapping[str, Any]) -> str:
    """The document as TOML."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    plain = {name: value for name, value in document.items() if not isinstance(value, dict | list)}
    yield from (f"{name} = {_toml(value)}" for name, value in plain.items())
    for name, value in document.items():
        for one in value if isinstance(value, list) else [value] if isinstance(value, dict) else []:
            yield ""
            yield f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
            yield from (f"{field} = {_toml(item)}" for field, item in one.items())


def _toml(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped. Surrogates, which
    # neither has, do not come out of JSON's own decoder in pairs and are refused by the API.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def loads(text: str, name: str = "document") -> dict[str, Any]:
    """The document of a TOML text.

    Raises:
        CtlError: it is none, or of a format that we do not know.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CtlError(f"{name}: {error}") from None
    if document.get("format") != FORMAT:
        raise CtlError(f"{name}: format: {document.get('format')!r} is not {FORMAT}")
    known = {"format", "service", GLOBALS.name, *(resource.name for resource in RESOURCES)}
    for part in document.keys() - known:
        raise CtlError(f"{name}: {part}: there is no such resource")
    return document


# -- Difference -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One request of an import."""

    action: str
    """``create``, ``update`` or ``delete``."""
    resource: Resource | None
    """None: the service."""
    key: Key
    id: int | None
    """None: not created yet, or there is but one."""
    changes: dict[str, tuple[Any, Any]]
    """Name in the document → (value now, value then), both as in the document."""

    @property
    def title(self) -> str:
        """What it is about."""
        if self.resource is None:
            return "service"
        return " ".join([self.resource.name, "/".join(map(str, self.key))]).strip()

    def _secret(self, name: str) -> bool:
        return self.resource is not None and any(
            column.secret and field_name(column) == name for column in self.resource.own
        )

    def lines(self) -> list[str]:
        """What it does, for people; secrets masked."""
        lines = [f"{ {'create': '+', 'update': '~', 'delete': '-'}[self.action] } {self.title}"]
        for name, (before, after) in self.changes.items():
            texts = [MASK if self._secret(name) and value else _toml(value) for value in (before, after)]
            lines.append(
                f"    {name} = {texts[1]}"
                if self.action == "create"
                else f"    {name}: {texts[0]} -> {texts[1]}"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        changes = {
            name: [MASK if self._secret(name) and value else value for value in pair]
            for name, pair in self.changes.items()
        }
        return {
            "action": self.action,
            "resource": self.resource.name if self.resource else "service",
            "key": list(self.key),
            "changes": changes,
        }


def plan(client: Client, document: Mapping[str, Any], *, delete: bool = False) -> list[Step]:
    """The steps that make the daemon's configuration that of the document, in order.

    Raises:
        CtlError: the document is wrong; nothing was sent.
    """
    current = _fetch(client)
    ids = _ids(current)
    wanted = {resource.name: _wanted(resource, document) for resource in RESOURCES}
    _check_references(document, wanted, ids, delete)
    deletions: list[Step] = []
    writes: list[Step] = []
    for resource in RESOURCES:
        by_key = {key: id for id, key in ids[resource.name].items()}
        shown_by_id = {shown["id"]: shown for shown in current[resource.name]}
        for key, values in wanted[resource.name].items():
            if key not in by_key:
                created = {name: (None, value) for name, value in values.items()}
                writes.append(Step("create", resource, key, None, created))
                continue
            id = by_key.pop(key)
            changes = _changes(_show(resource, shown_by_id[id], ids, True), values)
            if changes:
                writes.append(Step("update", resource, key, id, changes))
        if delete:
            deletions += (Step("delete", resource, key, id, {}) for key, id in by_key.items())
        if resource.name == "portal" and GLOBALS.name in document:
            # After the credentials that it may refer to; before the targets, which its base name names.
            values = _values(GLOBALS, document[GLOBALS.name], GLOBALS.name)
            shown = client.request("GET", f"{GLOBALS.path}/")
            changes = _changes(_show(GLOBALS, shown, ids, True), values)
            if changes:
                writes.append(Step("update", GLOBALS, (), None, changes))
    # What goes makes room (names, addresses, LUNs) for what comes; who refers goes before what it refers to.
    return deletions[::-1] + writes + _service_step(client, document)


def _service_step(client: Client, document: Mapping[str, Any]) -> list[Step]:
    service = document.get("service", {})
    if not isinstance(service, dict) or service.keys() - {"enabled"}:
        raise CtlError("service: only enabled = true or false can stand there")
    enabled = service.get("enabled")
    if enabled is None:
        return []
    if not isinstance(enabled, bool):
        raise CtlError("service: enabled: true or false")
    now = bool(client.request("GET", SERVICE_PATH)["srv_enable"])
    return [] if now is enabled else [Step("update", None, (), None, {"enabled": (now, enabled)})]


def _changes(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (now[name], value) for name, value in then.items() if now[name] != value}


def _wanted(resource: Resource, document: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """Key → values, of one resource in the document."""
    entries = document.get(resource.name, [])
    if not isinstance(entries, list):
        raise CtlError(f"{resource.name}: is a list; begin each with [[{resource.name}]]")
    found: dict[Key, dict[str, Any]] = {}
    names = [field_name(resource.declaration.by_attribute[attribute]) for attribute in resource.key]
    for number, entry in enumerate(entries, 1):
        where = f"{resource.name} {number}"
        values = _values(resource, entry, where)
        missing = [name for name in names if values.get(name, "") == ""]
        if missing:
            raise CtlError(f"{where}: {missing[0]}: it is named by this, so it must be there")
        key = tuple(values[name] for name in names)
        if key in found:
            raise CtlError(f"{where}: {' and '.join(names)}: the same as of another before")
        found[key] = values
    return found


def _values(resource: Resource, entry: object, where: str) -> dict[str, Any]:
    """The values of one entry as the API would show them.

    Raises:
        FieldsError: by name in the document, ``where`` before it.
    """
    if not isinstance(entry, dict):
        raise CtlError(f"{where}: is no table")
    by_name = {field_name(column): column for column in resource.own}
    errors: dict[str, list[str]] = {}
    body: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, value in entry.items():
        column = by_name.get(name)
        if column is None:
            errors[f"{where}: {name}"] = ["There is no such field."]
        elif column.rule.reference is not None:
            if (
                not isinstance(value, str | int)
                or isinstance(value, bool)
                or (value == "" and not column.nullable)
            ):
                errors[f"{where}: {name}"] = ["Name what is meant."]
            values[name] = value
        else:
            body[column.wire] = value
    typed, wrong = resource.declaration.read(body, creating=False)
    errors |= {f"{where}: {resource.field_names[wire]}": messages for wire, messages in wrong.items()}
    if errors:
        raise FieldsError(errors)
    for attribute, value in typed.items():
        name = field_name(resource.declaration.by_attribute[attribute])
        values[name] = "" if value is None else list(value) if isinstance(value, tuple) else value
    return {name: values[name] for name in entry}


def _check_references(
    document: Mapping[str, Any], wanted: Mapping[str, Mapping[Key, dict[str, Any]]], ids: Ids, delete: bool
) -> None:
    for resource in RESOURCES:
        for column in resource.own:
            if column.rule.reference is None:
                continue
            other = BY_COLLECTION[column.rule.reference.collection]
            there = set(wanted[other.name])
            if not delete:
                there |= set(ids[other.name].values())
            for key, values in wanted[resource.name].items():
                meant = values.get(field_name(column), "")
                if meant != "" and (meant,) not in there:
                    title = f"{resource.name} {'/'.join(map(str, key))}"
                    raise CtlError(f"{title}: {field_name(column)}: there is no {other.name} {meant!r}")


# -- Import -----------------------------------------------------------------------------------------


FORCIBLE = frozenset(("extent", "target"))
"""Resources whose changes may be refused while initiators are logged in."""
FORCE = "?force=1"


def carry_out(client: Client, steps: list[Step], *, force: bool = False) -> Iterator[Step]:
    """Do the steps, and yield each when it is done.

    Args:
        force: also what is refused while initiators are logged in.

    Raises:
        CtlError: one failed; the rest was not tried.
    """
    current = _fetch(client)
    by_key = {name: {key: id for id, key in objects.items()} for name, objects in _ids(current).items()}
    for step in steps:
        try:
            _do(client, step, by_key, force)
        except FieldsError as error:
            names = step.resource.field_names if step.resource else {}
            raise FieldsError(
                {
                    f"{step.title}: {names.get(wire, wire)}" if wire != "__all__" else step.title: messages
                    for wire, messages in error.errors.items()
                }
            ) from None
        except CtlError as error:
            raise CtlError(f"{step.title}: {error}") from None
        yield step


def _do(client: Client, step: Step, by_key: dict[str, dict[Key, int]], force: bool) -> None:
    resource = step.resource
    if resource is None:
        client.request("PUT", SERVICE_PATH, {"srv_enable": step.changes["enabled"][1]})
        return
    path = f"{resource.path}/" if step.id is None else f"{resource.path}/{step.id}/"
    if step.action == "delete":
        # Gone already where what it referred to went first.
        client.request("DELETE", path, missing=True)
        by_key[resource.name].pop(step.key, None)
        return
    body: dict[str, Any] = {}
    for column in resource.own:
        name = field_name(column)
        if name not in step.changes:
            continue
        value = step.changes[name][1]
        if column.rule.reference is not None:
            other = BY_COLLECTION[column.rule.reference.collection]
            value = None if value == "" else by_key[other.name][(value,)]
        body[column.wire] = value
    if step.action == "create":
        by_key[resource.name][step.key] = client.request("POST", path, body)["id"]
    else:
        client.request("PUT", path + FORCE if force and resource.name in FORCIBLE else path, body)
