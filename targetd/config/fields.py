"""How a field of a resource is declared, and the declaration as data.

What one field may hold is written beside it, with ``Annotated``: ``Range``, ``OneOf``, ``Text``,
``Reference``, ``AuthTag``. ``rules(cls)`` gives that back as data, and everything that needs it reads it
there: ``check_value`` and ``validate``, the wire schema in ``api/``, the columns in the store, the
cascades of ``remove``. Knows no resource.
"""

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from targetd.config.parsing import NOT_A_NUMBER

__all__ = [
    "INVALID_CHOICE",
    "NOT_A_NUMBER",
    "REQUIRED",
    "AuthTag",
    "FieldRule",
    "OneOf",
    "Range",
    "Reference",
    "Text",
    "check_value",
    "rules",
    "well_typed",
]

# Clients match on these texts: api-semantics §2.1, §5.1; the rest are those of the forms behind it.
REQUIRED = "This field is required."
INVALID_CHOICE = "Select a valid choice. {} is not one of the available choices."
OUT_OF_RANGE = "This value must be between {} and {}, inclusive."
TOO_LONG = "Ensure this value has at most {} characters (it has {})."


@dataclass(frozen=True, slots=True)
class Range:
    """Integers from ``low`` to ``high``, both included."""

    low: int
    high: int
    message: str = OUT_OF_RANGE


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these. A ``Literal`` type needs no mark."""

    choices: tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Text of at most ``max_length`` characters; all of it must match ``pattern``."""

    max_length: int
    required: bool = False
    """May not be empty."""
    lines: bool = False
    """May hold tabs and line breaks. No other control character is allowed anywhere, NUL least of all."""
    pattern: str = ""
    message: str = "Enter a valid value."
    """Said when ``pattern`` does not match."""
    check: Callable[[str], str | None] | None = None
    """What no pattern can say; not asked of empty text. Returns the message."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The id of an object there. It must exist; when it is removed, whoever refers to it goes too (§6.4)."""

    collection: str


@dataclass(frozen=True, slots=True)
class AuthTag:
    """The tag of a group of credentials. It must exist when it is written, and may dangle later (§6.4).

    ``method`` names the attribute beside it which says whether it is needed.
    """

    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRule:
    """One field's declaration, as data. ``Range`` and the like are None where nothing of the kind holds."""

    attribute: str
    type: type[int] | type[str] | type[bool] | type[tuple[str, ...]]
    nullable: bool
    required: bool
    """Has no default."""
    default: Any
    secret: bool
    """Kept out of logs and ``repr``."""
    choices: tuple[str | int, ...] | None = None
    range: Range | None = None
    text: Text | None = None
    reference: Reference | None = None
    auth_tag: AuthTag | None = None


_rules: dict[type, Mapping[str, FieldRule]] = {}


def rules(cls: type) -> Mapping[str, FieldRule]:
    """Attribute → its declaration, in order, for any resource's class or the global configuration's."""
    if cls not in _rules:
        _rules[cls] = types.MappingProxyType(_read_rules(cls))
    return _rules[cls]


def _read_rules(cls: type) -> dict[str, FieldRule]:
    hints = get_type_hints(cls, include_extras=True)
    found: dict[str, FieldRule] = {}
    for item in fields(cls):
        hint = hints[item.name]
        marks: dict[type, Any] = {type(mark): mark for mark in getattr(hint, "__metadata__", ())}
        hint = hint.__origin__ if marks else hint
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        (base,) = (option for option in options if option is not types.NoneType)
        choices = get_args(base) if get_origin(base) is Literal else None
        if OneOf in marks:
            choices = marks[OneOf].choices
        required = item.default is MISSING
        found[item.name] = FieldRule(
            attribute=item.name,
            type=type(choices[0]) if choices else get_origin(base) or base,
            nullable=len(options) > 1,
            required=required,
            default=None if required else item.default,
            secret=not item.repr,
            choices=choices,
            range=marks.get(Range),
            text=marks.get(Text),
            reference=marks.get(Reference),
            auth_tag=marks.get(AuthTag),
        )
    return found


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_IN_LINES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def well_typed(rule: FieldRule, value: object) -> bool:
    """Whether the value has the field's type at all; True is no integer."""
    if value is None:
        return rule.nullable
    if isinstance(value, tuple):
        return rule.type is tuple and all(type(item) is str for item in value)
    return type(value) is rule.type


def check_value(rule: FieldRule, value: object) -> str | None:
    """What is wrong with this value in this field by itself, or None."""
    if value is None:
        return None if rule.nullable else REQUIRED
    if not well_typed(rule, value):
        return NOT_A_NUMBER if rule.type is int else "Enter a valid value."
    if rule.choices is not None and value not in rule.choices:
        return INVALID_CHOICE.format(value)
    if isinstance(value, int):
        bounds = rule.range
        if bounds is not None and not bounds.low <= value <= bounds.high:
            return bounds.message.format(bounds.low, bounds.high)
    elif isinstance(value, str) and rule.text is not None:
        return _check_text(rule.text, value)
    return None


def _check_text(text: Text, value: str) -> str | None:
    if not value:
        return REQUIRED if text.required else None
    if len(value) > text.max_length:
        return TOO_LONG.format(text.max_length, len(value))
    if (_CONTROL_IN_LINES if text.lines else _CONTROL).search(value):
        return "Control characters are not allowed."
    if _SURROGATE.search(value):
        return "Enter valid Unicode text."
    if text.pattern and not re.fullmatch(text.pattern, value):
        return text.message
    return text.check(value) if text.check is not None else None
