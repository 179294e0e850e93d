"""What all resources with an ``id`` have in common: list, create, read, update, delete.

A write reads its body into typed values, then hands the engine an *edit*: a pure function from the
configuration in force to the next one. Whether that is valid and can be carried out is the engine's
answer. A body with a wrong field does not reach the engine; a trial run on the side then finds what else
is wrong, so that the client is told everything at once.

A subclass says how its objects are made and changed (``create``, ``update``), and what a body must look
like beyond single fields (``settle``).
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, ClassVar, cast

from aiohttp import web

from api.auth import USER
from api.bodies import content_range, filters, forced, matches, page, read_object, sorting, strict
from api.encoding import answer_long
from api.errors import BadRequestError, FieldsError, NotFoundError, answer
from api.routing import Operation, Router
from api.schema import Declaration, coerce
from targetd.config import (
    WHOLE,
    Collection,
    ConfigError,
    Configuration,
    Problem,
    add,
    next_id,
    normalise,
    objects,
    remove,
    replace_object,
    validate,
)
from targetd.interface import Edit, Engine
from targetd.system.pieces import gathered

__all__ = ["PREFIX", "CollectionResource", "Draft"]

PREFIX = "/api/v1.0/"
LIST_PARAMETERS = ("limit", "offset")
SECRETS_PARAMETERS = ("secrets",)


@dataclass(slots=True)
class Draft:
    """A body on its way to an edit."""

    values: dict[str, Any]
    """By attribute."""
    errors: dict[str, list[str]]
    """By wire name."""
    creating: bool
    renamed: dict[str, str] = field(default_factory=dict)
    """Attribute → another in whose name its problems are told."""


class CollectionResource:
    """One collection of the configuration at one URL."""

    declaration: ClassVar[Declaration]
    name: ClassVar[str]
    """Last part of the URL."""
    goes_by_cascade: ClassVar[bool] = False
    """Clients delete what its objects refer to, and then them, and fail unless that succeeds too."""
    forcible: ClassVar[bool] = False
    """Some changes are refused while initiators are logged in, and ``?force=1`` makes them."""
    also_owns: ClassVar[frozenset[str]] = frozenset()
    """Further collections whose problems are told by field."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.collection = cast(Collection, self.declaration.collection)
        self.path = f"{PREFIX}services/iscsi/{self.name}/"
        self.has_secrets = any(column.secret for column in self.declaration.columns)

    def register(self, router: Router) -> None:
        """Add the two places: the collection and one object."""
        title = self.declaration.title
        secrets = SECRETS_PARAMETERS if self.has_secrets else ()
        failures: dict[int, str | None] = {400: "Error", 401: None}
        router.add(
            self.name,
            self.path,
            {
                "GET": Operation(
                    self.get_list,
                    "List.",
                    {200: f"{title}[]", **failures},
                    parameters=LIST_PARAMETERS + secrets,
                ),
                "POST": Operation(
                    self.post,
                    "Create.",
                    {201: title, **failures, 409: "FieldErrors"},
                    f"{title}Create",
                    (*secrets, "strict"),
                ),
            },
        )
        changed: dict[int, str | None] = {202: title, **failures, 404: None, 409: "FieldErrors"}
        asked = (*secrets, "strict", *(("force",) if self.forcible else ()))
        router.add(
            self.name,
            f"{self.path}{{id}}/",
            {
                "GET": Operation(self.detail, "Show.", {200: title, **failures, 404: None}, None, secrets),
                "PUT": Operation(self.put, "Change what the body names.", changed, f"{title}Update", asked),
                "PATCH": Operation(self.put, "The same as PUT.", changed, f"{title}Update", asked),
                "DELETE": self.delete_operation(),
            },
        )

    def delete_operation(self) -> Operation:
        """What DELETE is here."""
        summary = "Delete, with what refers to it."
        if self.goes_by_cascade:
            summary = (
                "Delete. 204 too for one that went with what it referred to; 404 for one that never was."
            )
        return Operation(self.delete, summary, {204: None, 401: None, 404: None})

    # -- what a resource says of its own ----------------------------------------------------------

    def order(self, record: Any) -> Any:
        """Key of the default order."""
        return record.id

    async def bodies(self, config: Configuration, records: Sequence[Any]) -> list[dict[str, Any]]:
        """The bodies that show objects."""
        return await gathered(self.show(config, record) for record in records)

    async def body(self, config: Configuration, record: Any) -> dict[str, Any]:
        """The body that shows one."""
        return (await self.bodies(config, [record]))[0]

    def show(self, config: Configuration, record: Any) -> dict[str, Any]:
        """The body of one, from the configuration alone."""
        return self.declaration.render(record)

    def settle(self, draft: Draft, config: Configuration, stored: Any | None) -> None:
        """Bring the values of a body into their final form; add what is wrong to ``draft.errors``.

        Args:
            draft: the body as read.
            config: in force when the request came; another edit may come before this one.
            stored: what a PUT is about; None: a POST.
        """

    def create(self, config: Configuration, id: int, values: Mapping[str, Any]) -> Configuration:
        """The configuration with the new object in it."""
        record = self.declaration.record(id=id, **values)
        return add(config, self.collection, normalise(record))

    def update(self, config: Configuration, stored: Any, values: Mapping[str, Any]) -> Configuration:
        """The configuration with the changed object; the same one if nothing changes."""
        return replace_object(config, self.collection, normalise(replace(stored, **values)))

    # -- reading ----------------------------------------------------------------------------------

    def listing(self, config: Configuration) -> Sequence[Any]:
        """All objects, in the default order."""
        return sorted(objects(config, self.collection).values(), key=self.order)

    async def get_list(self, request: web.Request) -> web.StreamResponse:
        """GET of the collection."""
        config = self.engine.configuration
        records = self.listing(config)
        masked = self.masks_secrets(request)

        def known(name: str) -> bool:
            return self._is_field(name, secrets=not masked)

        wanted, order = filters(request, known), sorting(request, known)
        if wanted or order:
            bodies = await self.bodies(config, records)
            for name, value in wanted.items():
                fits = await gathered(matches(body[name], value) for body in bodies)
                bodies = list(compress(bodies, fits))
            for name, descending in reversed(order):
                await asyncio.sleep(0)
                bodies.sort(key=lambda body: _sort_key(body[name]), reverse=descending)
            offset, shown = page(request, bodies)
            total = len(bodies)
        else:
            offset, chosen = page(request, records)
            shown = await self.bodies(config, chosen)
            total = len(records)
        if masked:
            shown = await gathered(self.declaration.mask(body) for body in shown)
        return await answer_long(list(shown), content_range(offset, len(shown), total))

    def _is_field(self, name: str, *, secrets: bool) -> bool:
        """Whether a list may be filtered and sorted by it: both tell what is in a field."""
        column = self.declaration.by_wire.get(name)
        if column is None:
            return name == "id"
        return not column.write_only and (secrets or not column.secret)

    def masks_secrets(self, request: web.Request) -> bool:
        """Whether the answer shows ``MASK`` for secrets: always to read-only users, who could log in to
        targets with them and write; to others if they ask for it by ``?secrets=masked``.

        Raises:
            BadRequestError: it asks for something else.
        """
        if not self.has_secrets:
            return False
        return asks_masked(request) or request[USER].read_only

    async def told(self, config: Configuration, record: Any, masked: bool) -> dict[str, Any]:
        """The body of one object as a request may see it."""
        body = await self.body(config, record)
        return self.declaration.mask(body) if masked else body

    def find(self, config: Configuration, id: int) -> Any:
        """The object.

        Raises:
            NotFoundError: there is none.
        """
        record = objects(config, self.collection).get(id)
        if record is None:
            raise NotFoundError
        return record

    async def detail(self, request: web.Request, id: int) -> web.StreamResponse:
        """GET of one object."""
        config = self.engine.configuration
        return answer(200, await self.told(config, self.find(config, id), self.masks_secrets(request)))

    # -- writing ----------------------------------------------------------------------------------

    async def write(
        self,
        id: int | None,
        body: Mapping[str, Any],
        more: Callable[[Configuration, int], Configuration] | None = None,
        force: bool = False,
    ) -> tuple[Configuration, Any]:
        """Create an object, or change one, as a body by wire names says.

        Args:
            id: of the object to change; None: create one.
            more: a further part of the same edit; takes the object's id.
            force: as ``Engine.apply`` takes it.

        Returns:
            The configuration with the object, and the object.

        Raises:
            NotFoundError: there is no such object.
            FieldsError: with all that is wrong; nothing has changed.
        """
        draft = self.drafted(self.engine.configuration, id, body)
        written = 0

        def edit(config: Configuration) -> Configuration:
            nonlocal written
            after, written = self.written(config, id, draft.values)
            return more(after, written) if more else after

        config = await self.carry_out(edit, draft, force=force)
        return config, self.find(config, written)

    def drafted(self, config: Configuration, id: int | None, body: Mapping[str, Any]) -> Draft:
        """A body as it is to be written over the object of this id; None: as a new one.

        Raises:
            NotFoundError: there is no such object.
        """
        stored = None if id is None else self.find(config, id)
        draft = Draft(*self.declaration.read(body, creating=id is None), creating=id is None)
        self.settle(draft, config, stored)
        return draft

    def written(
        self, config: Configuration, id: int | None, values: Mapping[str, Any]
    ) -> tuple[Configuration, int]:
        """The configuration with the values of a draft in it, and the id of the object."""
        if id is None:
            made = next_id(config, self.collection)
            return self.create(config, made, values), made
        return self.update(config, self.find(config, id), values), id

    async def post(self, request: web.Request) -> web.StreamResponse:
        """POST to the collection: create."""
        masked = self.masks_secrets(request)  # a wrong word is told before anything is done
        config, record = await self.write(None, await self._body(request))
        location = f"{request.scheme}://{request.host}{self.path}{record.id}/"
        return answer(201, await self.told(config, record, masked), {"Location": location})

    async def _body(self, request: web.Request) -> dict[str, Any]:
        """The body of a write; a client that asks for it is told of fields that are not known.

        Raises:
            FieldsError: there are such fields.
        """
        body = await read_object(request)
        if strict(request):
            refuse_unknown(body, self.declaration)
        return body

    async def put(self, request: web.Request, id: int) -> web.StreamResponse:
        """PUT or PATCH of one object: change what the body names."""
        self.find(self.engine.configuration, id)
        masked = self.masks_secrets(request)
        force = self.forcible and forced(request)
        config, record = await self.write(id, await self._body(request), force=force)
        return answer(202, await self.told(config, record, masked))

    async def delete(self, request: web.Request, id: int) -> web.StreamResponse:
        """DELETE of one object; what a cascade has taken is gone as asked for."""
        if not self._has_gone(id):
            try:
                await self.apply(self.removal(id))
            except NotFoundError:
                if not self._has_gone(id):  # meanwhile
                    raise
        return answer(204)

    def _has_gone(self, id: int) -> bool:
        """Whether a cascade may have taken it: ids are never given out again."""
        config = self.engine.configuration
        given = 0 < id < next_id(config, self.collection)
        return self.goes_by_cascade and given and id not in objects(config, self.collection)

    def removal(self, id: int) -> Edit:
        """The edit that removes an object and, by the model's cascades, what refers to it."""

        def edit(config: Configuration) -> Configuration:
            self.find(config, id)
            return remove(config, self.collection, id)

        return edit

    async def carry_out(
        self, edit: Edit, draft: Draft, clone_of: int | None = None, force: bool = False
    ) -> Configuration:
        """Apply the edit of a body without errors; else say all that is wrong with it.

        Raises:
            FieldsError: and nothing has changed.
        """
        if draft.errors:
            raise FieldsError(self.all_errors(edit, draft))
        return await self.apply(edit, draft.renamed, clone_of=clone_of, force=force)

    async def apply(
        self,
        edit: Edit,
        renamed: Mapping[str, str] | None = None,
        discard: frozenset[int] = frozenset(),
        clone_of: int | None = None,
        force: bool = False,
    ) -> Configuration:
        """Have the engine apply an edit.

        Raises:
            FieldsError: it was refused, and nothing has changed.
        """
        try:
            return await self.engine.apply(edit, discard_files=discard, clone_of=clone_of, force=force)
        except ConfigError as error:
            raise FieldsError(self.wire_errors(error.problems, renamed or {})) from None

    def all_errors(self, edit: Edit, draft: Draft) -> dict[str, list[str]]:
        """The errors of a draft, and those that the rest of the body has, found on a trial run."""
        config = self.engine.configuration
        if draft.creating:
            for column in self.declaration.columns:
                if column.required:
                    draft.values.setdefault(column.attribute, self.declaration.stand_in(column.attribute))
        try:
            validate(edit(config), since=config)
        except ConfigError as error:
            found = self.wire_errors(error.problems, draft.renamed)
        else:
            found = {}
        return {**found, **draft.errors}

    def wire_errors(self, problems: Iterable[Problem], renamed: Mapping[str, str]) -> dict[str, list[str]]:
        """Messages by wire name; problems of other collections are told as a whole."""
        own = self.also_owns | {self.collection}
        return self.declaration.wire_errors(
            Problem(self.collection, renamed.get(problem.attribute, problem.attribute), problem.message)
            if problem.collection in own
            else Problem(self.collection, WHOLE, problem.message)
            for problem in problems
        )


def refuse_unknown(body: Mapping[str, Any], declaration: Declaration) -> None:
    """See that a body has no fields but those of a resource; what is only shown may come back.

    Raises:
        FieldsError: it has.
    """
    known = {"id"}.union(*((column.wire, *column.also) for column in declaration.columns))
    unknown = [name for name in body if name not in known]
    if unknown:
        raise FieldsError({name: ["There is no such field."] for name in unknown})


def asks_masked(request: web.Request) -> bool:
    """Whether ``?secrets=masked`` asks for ``MASK`` in place of secrets.

    Raises:
        BadRequestError: it asks for something else.
    """
    wanted = request.query.get("secrets", "shown")
    if wanted not in ("shown", "masked"):
        raise BadRequestError(f"Invalid secrets '{wanted[:40]}' provided. Use 'shown' or 'masked'.")
    return wanted == "masked"


def _sort_key(value: Any) -> tuple[bool, Any]:
    """null first, as in the database behind the real API."""
    return value is not None, value


def wants_discard(body: Mapping[str, Any]) -> bool:
    """Whether the body of a DELETE says ``{"delete": true}`` (api-semantics §6.3).

    Raises:
        FieldsError: it says neither yes nor no.
    """
    value = body.get("delete")
    try:
        return value is not None and bool(coerce(bool, value))
    except ValueError as error:
        raise FieldsError({"delete": [str(error)]}) from None
