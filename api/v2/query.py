"""Filters and options of every ``….query`` method, over lists of JSON objects.

A filter is ``[field, operator, value]`` or ``["OR", [filter, …]]``; all of a list must hold. A field may lead
into objects by dots (``volsize.parsed``).

    =  !=  >  >=  <  <=  in  nin  rin  rnin  ^ (begins with)  !^  $ (ends with)  !$  ~ (regular expression)

Options: ``get`` (the one object, an error where there is none), ``count``, ``order_by``, ``offset``,
``limit`` (0 = all), ``select``, ``extra`` (which each method explains).
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final

import regex
from pydantic import Field

from api.v2.errors import CallError
from api.v2.methods import Model, Parameter

__all__ = ["PARAMETERS", "QueryOptions", "select"]

PATTERN_S: Final = 0.05
"""How long a regular expression may look at one value; a hostile one could go on for ever."""
MAX_PATTERN: Final = 200
MAX_DEPTH: Final = 8
"""Of OR within OR."""


class QueryOptions(Model):
    """How a result is cut and ordered."""

    get: bool = False
    count: bool = False
    order_by: list[str] = Field(default_factory=list)
    offset: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=0)] = 0
    select: list[str] = Field(default_factory=list)
    extra: dict[str, Any] = Field(default_factory=dict)
    relationships: bool = True
    """Taken for TrueNAS' sake: objects are always whole here."""


PARAMETERS: Final = (
    Parameter("query-filters", list[Any], list),
    Parameter("query-options", QueryOptions, QueryOptions),
)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def test(value: Any, wanted: Any) -> bool:
        try:
            return value is not None and compare(value, wanted)
        except TypeError:
            return False

    return test


def _within(value: Any, wanted: Any) -> bool:
    return isinstance(wanted, list) and value in wanted


def _holds(value: Any, wanted: Any) -> bool:
    return isinstance(value, list | str | dict) and wanted in value


def _matches(value: Any, wanted: Any) -> bool:
    if not isinstance(wanted, str) or len(wanted) > MAX_PATTERN:
        raise CallError(f"a pattern is text of at most {MAX_PATTERN} characters")
    try:
        return regex.match(wanted, str(value), timeout=PATTERN_S) is not None
    except TimeoutError:
        raise CallError(f"the pattern {wanted!r} takes too long") from None
    except regex.error as error:
        raise CallError(f"{wanted!r} is no regular expression: {error}") from None


OPERATORS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "=": lambda value, wanted: value == wanted,
    "!=": lambda value, wanted: value != wanted,
    ">": _ordered(lambda value, wanted: value > wanted),
    ">=": _ordered(lambda value, wanted: value >= wanted),
    "<": _ordered(lambda value, wanted: value < wanted),
    "<=": _ordered(lambda value, wanted: value <= wanted),
    "in": _within,
    "nin": lambda value, wanted: not _within(value, wanted),
    "rin": _holds,
    "rnin": lambda value, wanted: not _holds(value, wanted),
    "^": lambda value, wanted: isinstance(value, str) and value.startswith(str(wanted)),
    "!^": lambda value, wanted: isinstance(value, str) and not value.startswith(str(wanted)),
    "$": lambda value, wanted: isinstance(value, str) and value.endswith(str(wanted)),
    "!$": lambda value, wanted: isinstance(value, str) and not value.endswith(str(wanted)),
    "~": _matches,
}


def _value(item: Mapping[str, Any], field: str) -> Any:
    found: Any = item
    for part in field.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return item.get(field)
        found = found[part]
    return found


def _test(filters: Sequence[Any], depth: int = 0) -> Callable[[Mapping[str, Any]], bool]:
    """All of the filters as one function.

    Raises:
        CallError: one of them is none.
    """
    if depth > MAX_DEPTH:
        raise CallError("query-filters: nested too deeply")
    tests: list[Callable[[Mapping[str, Any]], bool]] = []
    for one in filters:
        match one:
            case [str("OR"), list(branches)]:
                choices = [
                    _test(branch if branch and isinstance(branch[0], list) else [branch], depth + 1)
                    for branch in branches
                    if isinstance(branch, list)
                ]
                tests.append(lambda item, choices=choices: any(choice(item) for choice in choices))  # type: ignore[misc]
            case [str(field), str(name), wanted] if name in OPERATORS:
                compare = OPERATORS[name]
                tests.append(
                    lambda item, field=field, compare=compare, wanted=wanted: compare(
                        _value(item, field), wanted
                    )  # type: ignore[misc]
                )
            case _:
                raise CallError(f"query-filters: {str(one)[:80]} is not [field, operator, value]")
    return lambda item: all(test(item) for test in tests)


def select(items: Sequence[Mapping[str, Any]], filters: Sequence[Any], options: QueryOptions) -> Any:
    """The result of a query over all objects: a list, one object (``get``) or a number (``count``).

    Raises:
        CallError: a filter is wrong; with ``get``: nothing was found (ENOENT).
    """
    test = _test(filters)
    found = [item for item in items if test(item)]
    if options.count:
        return len(found)
    for name in reversed(options.order_by):
        field = name.removeprefix("nulls_first:").removeprefix("nulls_last:")
        last = not name.startswith("nulls_first:")
        descending = field.startswith("-")
        field = field.lstrip("-")
        there = [item for item in found if _value(item, field) is not None]
        absent = [item for item in found if _value(item, field) is None]
        try:
            there.sort(key=lambda item: _value(item, field), reverse=descending)
        except TypeError:
            raise CallError(f"order_by: values of {field} have no order") from None
        found = there + absent if last else absent + there
    if options.get:
        if not found:
            raise CallError("no object matches the filters", errno.ENOENT)
        return _chosen(found[0], options)
    found = found[options.offset :]
    if options.limit:
        found = found[: options.limit]
    return [_chosen(item, options) for item in found]


def _chosen(item: Mapping[str, Any], options: QueryOptions) -> dict[str, Any]:
    if not options.select:
        return dict(item)
    return {field: _value(item, field) for field in options.select}
