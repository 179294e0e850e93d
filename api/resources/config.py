"""``config/``: the whole configuration as a document, and many changes as one.

Whatever a POST brings is one edit of the engine: it is in force as a whole, with the files of new extents, or
nothing has changed. What is refused is told by object and field.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from aiohttp import web

from api.auth import USER
from api.bodies import flagged, read_object
from api.document import (
    BY_COLLECTION,
    GLOBALS_KIND,
    KINDS,
    Change,
    DocumentError,
    Kind,
    document_of,
    field_name,
    operations,
    shown,
    titled,
    wanted_by,
)
from api.errors import FieldsError, answer
from api.fields import GLOBAL_CONFIGURATION
from api.resources.collection import PREFIX, SECRETS_PARAMETERS, CollectionResource, asks_masked
from api.routing import Operation, Router
from api.schema import MASK
from targetd.config import Collection, ConfigError, Configuration, Problem, objects, remove
from targetd.interface import Engine

__all__ = ["ConfigResource"]

PATH: Final = f"{PREFIX}config/"
MAX_DOCUMENT_BYTES: Final = 4 << 20
"""Some 8,000 objects."""


@dataclass(slots=True)
class _Work:
    """Changes on their way into a configuration."""

    config: Configuration
    done: list[dict[str, Any]] = field(default_factory=list)
    """What each change did, as it is answered."""
    errors: dict[str, list[str]] = field(default_factory=dict)
    ids: dict[str, dict[tuple[Any, ...], int]] = field(default_factory=dict)
    """Kind → key, with the ids of what it refers to → id."""

    def __post_init__(self) -> None:
        for kind in KINDS:
            self.ids[kind.name] = {
                _own_key(kind, record): record.id for record in self.objects(kind).values()
            }

    def objects(self, kind: Kind) -> Mapping[int, Any]:
        """What there is of a kind now."""
        return objects(self.config, kind.collection)

    def find(self, kind: Kind, key: Sequence[Any]) -> int | None:
        """The id of an object that a document names; None: there is none."""
        own: list[Any] = []
        for attribute, part in zip(kind.key, key, strict=True):
            reference = kind.declaration.by_attribute[attribute].rule.reference
            own.append(self.find(BY_COLLECTION[reference.collection], (part,)) if reference else part)
        id = self.ids[kind.name].get(tuple(own))
        return id if id in self.objects(kind) else None


def _own_key(kind: Kind, record: Any) -> tuple[Any, ...]:
    return tuple(getattr(record, attribute) for attribute in kind.key)


class ConfigResource:
    """The document."""

    def __init__(self, engine: Engine, collections: Iterable[CollectionResource]) -> None:
        self.engine = engine
        self._writers = {collection.name: collection for collection in collections}

    def register(self, router: Router) -> None:
        """Add its place."""
        failures: dict[int, str | None] = {400: "Error", 401: None}
        router.add(
            "config",
            PATH,
            {
                "GET": Operation(
                    self.get,
                    "The whole configuration, without secrets for those who may not have them.",
                    {200: "Document", **failures},
                    parameters=SECRETS_PARAMETERS,
                ),
                "POST": Operation(
                    self.post,
                    "Make the configuration that of a document, or do a list of operations: all or nothing.",
                    {200: "DocumentChanges", **failures, 409: "FieldErrors"},
                    "DocumentWrite",
                    ("dry_run", "delete", "force"),
                ),
            },
        )

    async def get(self, request: web.Request) -> web.StreamResponse:
        """GET of the document."""
        secrets = not asks_masked(request) and not request[USER].read_only
        return answer(200, document_of(self.engine.configuration, secrets=secrets))

    async def post(self, request: web.Request) -> web.StreamResponse:
        """POST of a document or of operations; with ``dry_run`` nothing changes."""
        dry_run, delete = flagged(request, "dry_run"), flagged(request, "delete")
        force = flagged(request, "force")
        # the copy has what was noted of the request so far, and may be longer
        body = await read_object(request.clone(client_max_size=MAX_DOCUMENT_BYTES))
        try:
            if "operations" in body:
                for name in body.keys() - {"operations"}:
                    raise DocumentError({name: ["Send a document or operations, not both."]})
                wanted = operations(body["operations"])
            else:
                wanted = wanted_by(body)
        except DocumentError as error:
            raise FieldsError(error.errors) from None
        whole = "operations" not in body

        work = _Work(self.engine.configuration)

        def edit(config: Configuration) -> Configuration:
            nonlocal work
            work = _Work(config)
            for change in [*(_left_out(work, wanted) if whole and delete else ()), *wanted]:
                self._carry_out(work, change)
            if work.errors:
                raise FieldsError(work.errors)
            return work.config if work.done else config

        discarded = self._discarded(wanted)
        try:
            if dry_run:
                await self.engine.foresee(edit, force=force)
            else:
                await self.engine.apply(edit, discard_files=discarded, force=force)
        except ConfigError as error:
            raise FieldsError(_told(work.config, self.engine.configuration, error.problems)) from None
        if dry_run:
            for one in work.done:
                one["id"] = None if one["action"] == "create" else one["id"]
        return answer(200, {"dry_run": dry_run, "changes": work.done})

    def _discarded(self, wanted: Iterable[Change]) -> frozenset[int]:
        work = _Work(self.engine.configuration)
        asked = (work.find(change.kind, change.key) for change in wanted if change.discard and change.kind)
        return frozenset(id for id in asked if id is not None)

    def _carry_out(self, work: _Work, change: Change) -> None:
        """Do one change; what is wrong with it goes to the errors, and the others are still looked at."""
        kind = change.kind
        try:
            if kind is None:
                self._settings(work, change, None)
            elif kind is GLOBALS_KIND:
                self._settings(work, change, kind)
            elif change.action == "delete":
                self._delete(work, change, kind)
            else:
                self._write(work, change, kind)
        except FieldsError as error:
            for wire, messages in error.errors.items():
                name = kind.field_names.get(wire, "") if kind else ""
                work.errors.setdefault(f"{change.title}: {name}" if name else change.title, messages)
        except ConfigError as error:
            for problem in error.problems:
                work.errors.setdefault(_where(kind, change.title, problem), []).append(problem.message)

    def _delete(self, work: _Work, change: Change, kind: Kind) -> None:
        id = work.find(kind, change.key)
        if id is None:
            raise FieldsError({"": ["There is no such object."]})
        work.config = remove(work.config, kind.collection, id)
        _note(work, "delete", change, id, {})

    def _write(self, work: _Work, change: Change, kind: Kind) -> None:
        id = work.find(kind, change.key)
        if id is None and change.action == "update":
            raise FieldsError({"": ["There is no such object."]})
        if id is not None and change.action == "create":
            raise FieldsError({"": ["There is one already."]})
        values = dict(change.values)
        before: Mapping[str, Any] = {}
        if id is not None:
            before = shown(kind, work.config, self._writers[kind.name].find(work.config, id))
            values = {name: value for name, value in values.items() if before[name] != value}
            if not values:
                return
        body: dict[str, Any] = {}
        for name, value in values.items():
            column = kind.by_name[name]
            reference = column.rule.reference
            if reference is None:
                body[column.wire] = value
                continue
            other = BY_COLLECTION[reference.collection]
            meant = None if value == "" else work.find(other, (value,))
            if value != "" and meant is None:
                raise FieldsError({column.wire: [f"there is no {other.name} {value!r}"]})
            body[column.wire] = meant
        writer = self._writers[kind.name]
        draft = writer.drafted(work.config, id, body)
        if draft.errors:
            raise FieldsError(draft.errors)
        work.config, written = writer.written(work.config, id, draft.values)
        work.ids[kind.name][_own_key(kind, writer.find(work.config, written))] = written
        action = "create" if id is None else "update"
        _note(
            work,
            action,
            change,
            written,
            {name: (before.get(name), value) for name, value in values.items()},
        )

    def _settings(self, work: _Work, change: Change, kind: Kind | None) -> None:
        """The globals, or whether the service runs."""
        before = (
            {"enabled": work.config.service_enabled}
            if kind is None
            else shown(kind, work.config, work.config.globals)
        )
        changed = {
            name: (before[name], value) for name, value in change.values.items() if before[name] != value
        }
        if not changed:
            return
        if kind is None:
            work.config = replace(work.config, service_enabled=change.values["enabled"])
        else:
            body = {kind.by_name[name].wire: value for name, (_, value) in changed.items()}
            values, errors = GLOBAL_CONFIGURATION.read(body, creating=False)
            if errors:
                raise FieldsError(errors)
            work.config = replace(work.config, globals=replace(work.config.globals, **values))
        _note(work, "update", change, None, changed)


def _left_out(work: _Work, wanted: Iterable[Change]) -> list[Change]:
    """Deletions of what a document does not name. They come first, since what goes makes room (names,
    addresses, LUNs) for what comes; and who refers goes before what it refers to."""
    named = {
        (change.kind.name, work.find(change.kind, change.key))
        for change in wanted
        if change.kind is not None and change.kind is not GLOBALS_KIND
    }
    left = []
    for kind in reversed(KINDS):
        for id, record in sorted(work.objects(kind).items()):
            if (kind.name, id) not in named:
                values = shown(kind, work.config, record)
                left.append(Change("delete", kind, tuple(values[name] for name in kind.key_names), {}))
    return left


def _note(
    work: _Work, action: str, change: Change, id: int | None, changes: Mapping[str, tuple[Any, Any]]
) -> None:
    secret = {field_name(column) for column in change.kind.own if column.secret} if change.kind else set()
    work.done.append(
        {
            "action": action,
            "resource": change.kind.name if change.kind else "service",
            "key": list(change.key),
            "id": id,
            "changes": {
                name: [MASK if name in secret and value else value for value in pair]
                for name, pair in changes.items()
            },
        }
    )


def _where(kind: Kind | None, title: str, problem: Problem) -> str:
    column = kind.declaration.by_attribute.get(problem.attribute) if kind else None
    return f"{title}: {field_name(column)}" if column else title


def _told(after: Configuration, before: Configuration, problems: Iterable[Problem]) -> dict[str, list[str]]:
    """Messages by object and field."""
    errors: dict[str, list[str]] = {}
    for problem in problems:
        kind = BY_COLLECTION.get(problem.collection, GLOBALS_KIND)
        title = kind.name
        if kind is not GLOBALS_KIND and problem.id is not None:
            for config in (after, before):
                record = objects(config, cast(Collection, problem.collection)).get(problem.id)
                if record is not None:
                    title = titled(kind, config, record)
                    break
        errors.setdefault(_where(kind, title, problem), []).append(problem.message)
    return errors
