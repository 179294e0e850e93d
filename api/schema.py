"""How a resource is shown on the wire, and what follows from the declaration.

What a field may hold is declared once, beside the field, in ``targetd.config``; ``model.rules`` gives that
back as data. A ``Field`` here adds what only the wire knows: the name there, the help text, spellings that
are accepted besides. A ``Declaration`` puts both together and gives everything else: typed values from a
JSON body with *all* field errors, the body of an answer, the wire names of errors, the JSON schemas of the
OpenAPI document, and the columns that the admin command shows.

(design.md §1 names pydantic for this. The model's own declarations already say type, default, bounds and
message, the engine checks them on every way in, and the messages must be FreeNAS' texts to the letter: a
pydantic model beside them would declare all of it a second time.)

Values arrive as from an HTML form, since the real API parsed them that way: numbers as strings, ``""`` and
``"null"`` for none, blanks around the text (api-semantics §2, "Input coercion").
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import replace as dataclass_replace
from typing import Any, Final

from targetd.config import (
    GLOBALS,
    NOT_A_NUMBER,
    REQUIRED,
    FieldRule,
    Problem,
    check_value,
    read_whole,
    rules,
)

__all__ = ["ABSENT", "ALL", "MASK", "Column", "Declaration", "Field", "as_nullable", "coerce"]

ALL: Final = "__all__"
"""The key of a message that concerns no single field."""


MASK = "***"
"""What stands for a secret that is not told."""


class _Absent:
    """The type of ``ABSENT``."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()
"""Where a value would stand: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field as the wire has it. What is left out follows from the model."""

    attribute: str
    """Of the configuration dataclass; also the name in ``ConfigError``."""
    wire: str
    help_text: str
    rule: FieldRule | None = None
    """Where the field is not the dataclass' own."""
    also: tuple[str, ...] = ()
    """Further spellings that are accepted in a body."""
    required: bool | None = None
    """A create without it fails; normally: the model has no default for it."""
    nullable: bool | None = None
    """null may be written; normally as the model has it."""
    blank: bool | None = None
    """Text may be empty; normally as the model has it."""
    empty: Any = ABSENT
    """What null and ``""`` mean on an update, where that is not None, ``""`` or False."""
    default: Any = ABSENT
    """Of a new object, for the documents, where it is not the model's."""
    convert: Callable[[str], str] | None = None
    """Brings text into its stored form before it is judged; a ValueError's text is the message."""
    verbatim: bool = False
    """Blanks around the text are part of it, as the real API's forms had it for passwords alone."""
    read_only: bool = False
    """Returned; in a body it is ignored."""
    write_only: bool = False
    """Taken; never returned."""
    example: Any = ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One field, ready for use: a ``Field`` and the model's rule in one."""

    attribute: str
    wire: str
    help_text: str
    rule: FieldRule
    also: tuple[str, ...]
    required: bool
    nullable: bool
    blank: bool
    empty: Any
    """What null means on an update; ``ABSENT``: it is refused."""
    none_words: frozenset[str]
    """Strings that mean null here."""
    convert: Callable[[str], str] | None
    verbatim: bool
    read_only: bool
    write_only: bool
    json_schema: Mapping[str, Any]

    @property
    def secret(self) -> bool:
        """Shown to users who may write, as the FreeNAS API does; kept out of logs and tables."""
        return self.rule.secret

    def read(self, value: object) -> Any:
        """The typed value of what a body says, which is not null.

        Raises:
            ValueError: with the message for the client.
        """
        typed = value if self.verbatim and isinstance(value, str) else coerce(self.rule.type, value)
        if self.rule.auth_tag is not None and typed in (0, -1):
            return None  # "no group", in every client that offers groups in a list (api-semantics §2, §5.8)
        if self.convert is not None:
            typed = self.convert(typed)
        message = check_value(self.rule, typed)
        if message is not None:
            raise ValueError(message)
        return typed


# -- Values as a form would send them ------------------------------------------------------------------


def coerce(kind: type, value: object) -> Any:
    """The value as the type, however a client spelled it.

    Raises:
        ValueError: it is none; with the message for the client.
    """
    return _COERCIONS[kind](value)


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("Enter text.")
    return value.strip() if isinstance(value, str) else str(value)


def _whole(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return read_whole(value)
    raise ValueError(NOT_A_NUMBER)


_WORDS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("true", "1", "on", "yes"), True),
    **dict.fromkeys(("false", "0", "off", "no", ""), False),
}


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    truth = _WORDS.get(str(value).strip().lower()) if isinstance(value, str | int) else None
    if truth is None:
        raise ValueError("Enter true or false.")
    return truth


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list) or len(value) > 1024:
        raise ValueError("Enter a list of at most 1024 texts.")
    return tuple(_text(item) for item in value)


_COERCIONS: Final[Mapping[type, Callable[[object], Any]]] = {
    str: _text,
    int: _whole,
    bool: _flag,
    tuple: _texts,
}

# -- What a declaration gives --------------------------------------------------------------------------


class Declaration:
    """A resource as declared: reads bodies, writes answers, names errors, describes itself."""

    def __init__(
        self, *, title: str, summary: str, record: type[Any], collection: str, fields: Iterable[Field]
    ) -> None:
        """Join the fields with the rules of the model.

        Args:
            title: name of the schema in the documents.
            summary: one sentence for the documents.
            record: the configuration dataclass.
            collection: where the model keeps it, ``globals`` for the singleton.
            fields: in the order of the documents.
        """
        self.title = title
        self.summary = summary
        self.collection = collection
        self.record = record
        known = rules(record)
        self.columns = tuple(_column(field, field.rule or known[field.attribute]) for field in fields)
        self.by_wire = {column.wire: column for column in self.columns}
        self.by_attribute = {column.attribute: column for column in self.columns}
        self._inputs = tuple(column for column in self.columns if not column.read_only)
        self._outputs = tuple(
            (column.wire, column.attribute) for column in self.columns if not column.write_only
        )

    def read(self, body: Mapping[str, Any], *, creating: bool) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Typed values by attribute for what the body says, and messages by wire name for what is wrong.

        null is "not supplied": a create takes the default; an update clears the field if it may be empty
        (api-semantics §2). What the body does not mention is in neither result, except that a create
        without a required field is wrong. A secret as ``mask`` shows it is not mentioned either.
        """
        values: dict[str, Any] = {}
        errors: dict[str, list[str]] = {}
        for column in self._inputs:
            raw = _find(body, column)
            if raw is ABSENT:
                if creating and column.required:
                    errors[column.wire] = [REQUIRED]
                continue
            if column.secret and raw == MASK:  # as it was shown: nothing was said about it
                if creating:
                    errors[column.wire] = [f"{MASK} stands for a secret that is not shown; give the secret."]
                continue
            if isinstance(raw, str):
                raw = raw if column.verbatim else raw.strip()
                if raw in column.none_words:
                    raw = None
                elif not raw and column.rule.type is str and not column.blank:
                    errors[column.wire] = [REQUIRED]
                    continue
            if raw is None:
                if creating and not column.required:
                    continue
                if creating or column.empty is ABSENT:
                    errors[column.wire] = [REQUIRED]
                else:
                    values[column.attribute] = column.empty
                continue
            try:
                values[column.attribute] = column.read(raw)
            except ValueError as error:
                errors[column.wire] = [str(error)]
        return values, errors

    def render(self, record: Any, **told: Any) -> dict[str, Any]:
        """The body that shows an object: the declared attributes, but for what is told beside it."""
        body: dict[str, Any] = {"id": record.id}
        for name, attribute in self._outputs:
            body[name] = told[attribute] if attribute in told else getattr(record, attribute)
        return body

    def mask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body with ``MASK`` for its secrets; one that is not set stays empty."""
        for column in self.columns:
            if column.secret and body.get(column.wire):
                body[column.wire] = MASK
        return body

    def wire_errors(self, problems: Iterable[Problem]) -> dict[str, list[str]]:
        """Messages by wire name; what this resource has no name for becomes ``__all__``."""
        named: dict[str, list[str]] = {}
        for problem in problems:
            column = self.by_attribute.get(problem.attribute)
            messages = named.setdefault(column.wire if column else ALL, [])
            if problem.message not in messages:
                messages.append(problem.message)
        return named

    def stand_in(self, attribute: str) -> Any:
        """Some value of the right type, so that the rest of a body can be judged although this is wrong."""
        rule = self.by_attribute[attribute].rule
        if rule.nullable:
            return None
        return rule.choices[0] if rule.choices else rule.type()

    def schemas(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """JSON schemas (draft 2020-12) by name: the object, a body that creates one, one that changes one."""
        properties: dict[str, Any] = {
            "id": {"type": "integer", "minimum": 1, "readOnly": True, "description": "Never used again."}
        }
        for column in self.columns:
            if not column.write_only:
                properties[column.wire] = _as_shown(column)
        yield (
            self.title,
            {
                "type": "object",
                "description": self.summary,
                "properties": properties,
                "required": list(properties),
            },
        )
        if self.collection != GLOBALS:
            yield (
                f"{self.title}Create",
                {
                    "type": "object",
                    "properties": {
                        column.wire: _as_taken(column, null=not column.required) for column in self._inputs
                    },
                    "required": [column.wire for column in self._inputs if column.required],
                },
            )
        yield (
            f"{self.title}Update",
            {
                "type": "object",
                "description": "What is left out keeps its value.",
                "properties": {
                    column.wire: {
                        key: value
                        for key, value in _as_taken(column, null=column.empty is not ABSENT).items()
                        if key != "default"
                    }
                    for column in self._inputs
                },
            },
        )


def _find(body: Mapping[str, Any], column: Column) -> Any:
    raw = body.get(column.wire, ABSENT)
    if raw is ABSENT:
        for name in column.also:
            if name in body:
                return body[name]
    return raw


def _column(field: Field, rule: FieldRule) -> Column:
    nullable = rule.nullable if field.nullable is None else field.nullable
    blank = field.blank
    if blank is None:
        blank = rule.type is str and (rule.text is None or not rule.text.required) and not rule.choices
    none_words = {"", "null"} if rule.type is int else set()
    if nullable or field.empty is not ABSENT:
        none_words.add("")
    empty = field.empty
    if empty is ABSENT:
        empty = None if nullable else "" if blank else False if rule.type is bool else ABSENT
    return Column(
        attribute=field.attribute,
        wire=field.wire,
        help_text=field.help_text,
        rule=rule,
        also=field.also,
        required=rule.required if field.required is None else field.required,
        nullable=nullable,
        blank=blank,
        empty=empty,
        none_words=frozenset(none_words),
        convert=field.convert,
        verbatim=field.verbatim,
        read_only=field.read_only,
        write_only=field.write_only,
        json_schema=_json_schema(field, rule, nullable, blank),
    )


_JSON_TYPES: Final[Mapping[type, str]] = {str: "string", int: "integer", bool: "boolean", tuple: "array"}


def _json_schema(field: Field, rule: FieldRule, nullable: bool, blank: bool) -> dict[str, Any]:
    name = _JSON_TYPES[rule.type]
    schema: dict[str, Any] = {"type": [name, "null"] if nullable else name, "description": field.help_text}
    if rule.type is tuple:
        schema["items"] = {"type": "string"}
    if rule.choices:
        schema["enum"] = [*rule.choices, *([None] if nullable else [])]
    if rule.range:
        # 0 and -1 stand for "no group"
        schema |= {"minimum": -1 if rule.auth_tag else rule.range.low, "maximum": rule.range.high}
    if rule.text:
        schema["maxLength"] = rule.text.max_length
        if not blank:
            schema["minLength"] = 1
    default = rule.default if field.default is ABSENT else field.default
    required = rule.required if field.required is None else field.required
    if not required and not field.read_only and (default is not None or nullable) and rule.type is not tuple:
        schema["default"] = default
    if field.read_only:
        schema["readOnly"] = True
    if field.write_only:
        schema["writeOnly"] = True
    if rule.secret:
        schema["format"] = "password"
    if field.example is not ABSENT:
        schema["examples"] = [field.example]
    return schema


def _as_shown(column: Column) -> dict[str, Any]:
    """As returned: bounds hold for what is written; what an older release stored is shown all the same."""
    dropped = {"default", "minimum", "maximum", "minLength", "maxLength"}
    return {key: value for key, value in column.json_schema.items() if key not in dropped}


def _as_taken(column: Column, *, null: bool) -> dict[str, Any]:
    """As written: null too where it means "not given" or "nothing"."""
    schema = dict(column.json_schema)
    if null and not column.nullable:
        schema["type"] = [schema["type"], "null"]
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
    return schema


def as_nullable(rule: FieldRule) -> FieldRule:
    """The rule of a field that is null where a flat view has nothing to show."""
    return dataclass_replace(rule, nullable=True)
