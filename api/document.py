"""The whole configuration as one document, and lists of operations in its words.

Objects are named in it by what they are called (an extent by its name, a portal by its tag), never by id:
ids are given by the daemon and differ from one to the next. So a document moves between daemons, and a
second import of it changes nothing. A document is what should be: a field that it leaves out keeps its
value; an object that it leaves out stays too, unless deletion is asked for.

``wanted_by`` and ``operations`` read either into ``Change``s, checked as far as they can be without the
configuration; ``api.resources.config`` carries them out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, cast

from api.fields import (
    AUTH_CREDENTIAL,
    EXTENT,
    GLOBAL_CONFIGURATION,
    INITIATOR_GROUP,
    LUN_MAPPING,
    PORTAL,
    TARGET,
    TARGET_GROUP,
)
from api.schema import Column, Declaration
from targetd.config import Collection, Configuration, objects, rules

__all__ = [
    "BY_COLLECTION",
    "FORMAT",
    "GLOBALS_KIND",
    "KINDS",
    "Change",
    "DocumentError",
    "Kind",
    "document_of",
    "field_name",
    "operations",
    "schemas",
    "shown",
    "titled",
    "wanted_by",
]

FORMAT: Final = 1
SERVICE: Final = "service"


class DocumentError(Exception):
    """What is wrong: object and field, as in the document → messages."""

    def __init__(self, errors: Mapping[str, list[str]]) -> None:
        super().__init__("; ".join(errors))
        self.errors = dict(errors)


def field_name(column: Column) -> str:
    """As in the document: the attribute; a reference drops its ``_id``, since it names what is meant."""
    return column.attribute.removesuffix("_id") if column.rule.reference else column.attribute


@dataclass(frozen=True)
class Kind:
    """One kind of object."""

    name: str
    """The last part of its URL."""
    declaration: Declaration
    key: tuple[str, ...]
    """Attributes that together name one object in a document."""

    @property
    def collection(self) -> Collection:
        """Where the model keeps its objects."""
        return cast(Collection, self.declaration.collection)

    @property
    def inputs(self) -> tuple[Column, ...]:
        """What can be written."""
        return tuple(column for column in self.declaration.columns if not column.read_only)

    @cached_property
    def own(self) -> tuple[Column, ...]:
        """What is its own and can be written, so: the flat view of a target's first grant is not."""
        stored = rules(self.declaration.record)
        return tuple(column for column in self.inputs if not column.write_only and column.attribute in stored)

    @cached_property
    def by_name(self) -> Mapping[str, Column]:
        """Name in the document → column."""
        return {field_name(column): column for column in self.own}

    @cached_property
    def field_names(self) -> Mapping[str, str]:
        """Wire name → name in the document."""
        return {column.wire: field_name(column) for column in self.declaration.columns}

    @cached_property
    def key_names(self) -> tuple[str, ...]:
        """The key, by names in the document."""
        return tuple(field_name(self.declaration.by_attribute[attribute]) for attribute in self.key)


GLOBALS_KIND: Final = Kind("globalconfiguration", GLOBAL_CONFIGURATION, ())
KINDS: Final = (
    Kind("authcredential", AUTH_CREDENTIAL, ("tag", "user")),
    Kind("authorizedinitiator", INITIATOR_GROUP, ("tag",)),
    Kind("portal", PORTAL, ("tag",)),
    Kind("extent", EXTENT, ("name",)),
    Kind("target", TARGET, ("name",)),
    Kind("targetgroup", TARGET_GROUP, ("target_id", "portal_id")),
    Kind("targettoextent", LUN_MAPPING, ("target_id", "extent_id")),
)
"""Each after those it refers to."""
BY_COLLECTION: Final = {kind.declaration.collection: kind for kind in KINDS}
_BY_NAME: Final = {kind.name: kind for kind in (*KINDS, GLOBALS_KIND)}


# -- What there is ------------------------------------------------------------------------------------


def shown(kind: Kind, config: Configuration, record: Any) -> dict[str, Any]:
    """An object as in the document. TOML has no null; the empty text means it, here as in the API."""
    return {field_name(column): _named(column, config, record) for column in kind.own}


def _named(column: Column, config: Configuration, record: Any) -> Any:
    value = getattr(record, column.attribute)
    if value is None:
        return ""
    if column.rule.reference is not None:
        kind = BY_COLLECTION[column.rule.reference.collection]
        return getattr(objects(config, kind.collection)[value], kind.key[0])
    return list(value) if isinstance(value, tuple) else value


def titled(kind: Kind, config: Configuration, record: Any) -> str:
    """What messages call an object."""
    columns = (kind.declaration.by_attribute[attribute] for attribute in kind.key)
    return _title(kind, [_named(column, config, record) for column in columns])


def _title(kind: Kind, key: Sequence[object]) -> str:
    return " ".join([kind.name, "/".join(map(str, key))]).strip()


def document_of(config: Configuration, *, secrets: bool = True) -> dict[str, Any]:
    """The document of a configuration. Without ``secrets`` it does not mention them, and an import of it
    leaves them as they are."""

    def told(kind: Kind, record: Any) -> dict[str, Any]:
        values = shown(kind, config, record)
        for column in kind.own:
            if column.secret and not secrets:
                del values[field_name(column)]
        return values

    document: dict[str, Any] = {
        "format": FORMAT,
        SERVICE: {"enabled": config.service_enabled},
        GLOBALS_KIND.name: told(GLOBALS_KIND, config.globals),
    }
    for kind in KINDS:
        records = objects(config, kind.collection)
        document[kind.name] = [told(kind, records[id]) for id in sorted(records)]
    return document


# -- What is wanted -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One object as it shall be."""

    action: str
    """``create``, ``update``, ``delete``, or ``put``: make it so, whether it is there or not."""
    kind: Kind | None
    """None: the service."""
    key: tuple[Any, ...]
    """By which it is named now; of references, the name of what is meant."""
    values: Mapping[str, Any]
    """By name in the document, in their stored form."""
    discard: bool = False
    """With the file of an extent that is deleted."""

    @property
    def title(self) -> str:
        """What messages call it."""
        return _title(self.kind, self.key) if self.kind else SERVICE


def wanted_by(document: Mapping[str, Any]) -> list[Change]:
    """What a document wants to be there, each after those it refers to.

    Raises:
        DocumentError: it is none.
    """
    if document.get("format") != FORMAT:
        raise DocumentError({"format": [f"{document.get('format')!r} is not {FORMAT}"]})
    errors: dict[str, list[str]] = {
        part: ["there is no such resource"]
        for part in document
        if part not in _BY_NAME and part not in ("format", SERVICE)
    }
    wanted: list[Change] = []
    for kind in KINDS:
        entries = document.get(kind.name, [])
        if isinstance(entries, list):
            wanted += _wanted(kind, entries, errors)
        else:
            errors[kind.name] = [f"is a list; begin each with [[{kind.name}]]"]
        if kind.name == "portal" and GLOBALS_KIND.name in document:
            # after the credentials that it may refer to; before the targets, which its base name names
            values = _values(GLOBALS_KIND, document[GLOBALS_KIND.name], GLOBALS_KIND.name, errors)
            wanted.append(Change("put", GLOBALS_KIND, (), values))
    if SERVICE in document:
        values = _service(document[SERVICE], errors)
        wanted.append(Change("put", None, (), values))
    if errors:
        raise DocumentError(errors)
    return wanted


def _wanted(kind: Kind, entries: Sequence[Any], errors: dict[str, list[str]]) -> Iterator[Change]:
    seen = set()
    for number, entry in enumerate(entries, 1):
        where = f"{kind.name} {number}"
        values = _values(kind, entry, where, errors)
        key = _key(kind, values, where, errors)
        if key is None:
            continue
        if key in seen:
            errors[f"{where}: {' and '.join(kind.key_names)}"] = ["the same as of another before"]
        seen.add(key)
        yield Change("put", kind, key, values)


def _service(given: object, errors: dict[str, list[str]]) -> dict[str, Any]:
    if not isinstance(given, dict) or given.keys() - {"enabled"}:
        errors[SERVICE] = ["only enabled = true or false can stand there"]
        return {}
    if "enabled" in given and not isinstance(given["enabled"], bool):
        errors[f"{SERVICE}: enabled"] = ["true or false"]
    return given


_ACTIONS: Final = {
    "create": {"action", "resource", "values"},
    "update": {"action", "resource", "key", "values"},
    "delete": {"action", "resource", "key", "discard_file"},
}
"""What an operation consists of."""


def operations(given: object) -> list[Change]:
    """A list of operations, in the order in which they are to be done.

    Raises:
        DocumentError: it is none.
    """
    if not isinstance(given, list):
        raise DocumentError({"operations": ["Enter a list."]})
    errors: dict[str, list[str]] = {}
    changes = [_operation(one, f"operation {number}", errors) for number, one in enumerate(given, 1)]
    if errors:
        raise DocumentError(errors)
    return [change for change in changes if change is not None]


def _operation(given: object, where: str, errors: dict[str, list[str]]) -> Change | None:
    action = given.get("action") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(action, str) or action not in _ACTIONS:
        errors[f"{where}: action"] = [f"One of: {', '.join(_ACTIONS)}."]
        return None
    for name in given.keys() - _ACTIONS[action]:
        errors[f"{where}: {name}"] = ["There is no such field."]
    name = given.get("resource")
    if name == SERVICE and action == "update":
        return Change(action, None, (), _service(given.get("values", {}), errors))
    kind = _BY_NAME.get(name) if isinstance(name, str) else None
    if kind is None or (kind is GLOBALS_KIND and action != "update"):
        errors[f"{where}: resource"] = [f"There is no {name!r} to {action}."[:200]]
        return None
    where = f"{where}: {kind.name}"
    values = {} if action == "delete" else _values(kind, given.get("values", {}), where, errors)
    if action == "create":
        key = _key(kind, values, where, errors)
    elif kind is GLOBALS_KIND:
        key = ()
    else:
        parts = given.get("key")
        parts = parts if isinstance(parts, list) else [parts]
        if len(parts) != len(kind.key_names):
            errors[f"{where}: key"] = [f"Name it by {' and '.join(kind.key_names)}."]
            return None
        named = dict(zip(kind.key_names, parts, strict=True))
        key = _key(kind, _values(kind, named, where, errors), where, errors)
    discard = given.get("discard_file", False)
    if not isinstance(discard, bool) or (discard and kind.name != "extent"):
        errors[f"{where}: discard_file"] = ["true or false, of an extent"]
        return None
    return None if key is None else Change(action, kind, key, values, discard)


def _key(
    kind: Kind, values: Mapping[str, Any], where: str, errors: dict[str, list[str]]
) -> tuple[Any, ...] | None:
    for name in kind.key_names:
        if values.get(name, "") == "":
            if not any(told.startswith(where) for told in errors):
                errors[f"{where}: {name}"] = ["it is named by this, so it must be there"]
            return None
    return tuple(values[name] for name in kind.key_names)


def _values(kind: Kind, entry: object, where: str, errors: dict[str, list[str]]) -> dict[str, Any]:
    """The values of one entry as they would be shown."""
    if not isinstance(entry, dict):
        errors[where] = ["is no table"]
        return {}
    body: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, value in entry.items():
        column = kind.by_name.get(name)
        if column is None:
            errors[f"{where}: {name}"] = ["There is no such field."]
        elif column.rule.reference is not None:
            if value in (None, "") and column.nullable:
                values[name] = ""
                continue
            other = BY_COLLECTION[column.rule.reference.collection]
            try:
                values[name] = other.declaration.by_attribute[other.key[0]].read(value)
            except ValueError:
                errors[f"{where}: {name}"] = ["Name what is meant."]
        else:
            body[column.wire] = value
    typed, wrong = kind.declaration.read(body, creating=False)
    for wire, messages in wrong.items():
        errors[f"{where}: {kind.field_names[wire]}"] = messages
    for attribute, value in typed.items():
        name = field_name(kind.declaration.by_attribute[attribute])
        values[name] = "" if value is None else list(value) if isinstance(value, tuple) else value
    return {name: values[name] for name in entry if name in values}


# -- For the OpenAPI document -------------------------------------------------------------------------


def schemas() -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON schemas by name: the document as shown, what may be sent, and what is answered."""
    described: dict[str, Any] = {
        "format": {"type": "integer", "const": FORMAT},
        SERVICE: {"type": "object", "properties": {"enabled": {"type": "boolean"}}},
    }
    described |= {kind.name: _described(kind) for kind in (GLOBALS_KIND, *KINDS)}
    yield (
        "Document",
        {
            "type": "object",
            "description": "Objects are named by what they are called: references hold the name of an extent "
            'or target, or the tag of a portal or initiator group. "" stands for null.',
            "properties": described,
            "required": list(described),
        },
    )
    operation = {
        "type": "object",
        "properties": {
            "action": {"type": "string", "enum": list(_ACTIONS)},
            "resource": {"type": "string", "enum": [*_BY_NAME, SERVICE]},
            "key": {
                "type": "array",
                "items": {"type": ["string", "integer"]},
                "description": "Names what is updated or deleted: "
                + "; ".join(f"{kind.name}: {', '.join(kind.key_names)}" for kind in KINDS),
            },
            "values": {"type": "object", "description": "By field, as in the document."},
            "discard_file": {
                "type": "boolean",
                "default": False,
                "description": "Of an extent that is deleted: its file too.",
            },
        },
        "required": ["action", "resource"],
    }
    yield (
        "DocumentWrite",
        {
            "type": "object",
            "description": "A document, as GET shows it, or operations in its words. Fields and objects that "
            "a document leaves out stay as they are.",
            "properties": {**described, "operations": {"type": "array", "items": operation}},
        },
    )
    step = {
        "type": "object",
        "properties": {
            "action": {"type": "string", "enum": list(_ACTIONS)},
            "resource": {"type": "string"},
            "key": {"type": "array", "items": {"type": ["string", "integer"]}},
            "id": {"type": ["integer", "null"], "description": "null: it has none, or not yet."},
            "changes": {
                "type": "object",
                "description": "Field → what it was (null: it was not there) and is; secrets are ***.",
            },
        },
        "required": ["action", "resource", "key", "id", "changes"],
    }
    yield (
        "DocumentChanges",
        {
            "type": "object",
            "properties": {"dry_run": {"type": "boolean"}, "changes": {"type": "array", "items": step}},
            "required": ["dry_run", "changes"],
        },
    )


def _described(kind: Kind) -> dict[str, Any]:
    """Of what an object has in the document; a type that the wire has too, but for references."""
    properties = {}
    for column in kind.own:
        text = {"description": column.json_schema["description"]}
        if column.rule.reference is not None:
            other = BY_COLLECTION[column.rule.reference.collection]
            text = {"description": f"{other.key[0].capitalize()} of the {other.name}."}
            properties[field_name(column)] = {"type": ["string", "integer"], **text}
        elif column.rule.type is tuple:
            properties[field_name(column)] = {"type": "array", "items": {"type": "string"}, **text}
        else:
            kinds = {str: "string", int: "integer", bool: "boolean"}
            name = kinds[column.rule.type]
            either = [name, "string"] if column.nullable and name != "string" else name
            properties[field_name(column)] = {"type": either, **text}
    one = {"type": "object", "properties": properties}
    return one if kind is GLOBALS_KIND else {"type": "array", "items": one}
