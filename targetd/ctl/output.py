"""Tables for people, JSON for programs.

What a peer or a client chose may hold anything: nothing that a terminal would obey reaches it.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from api.schema import MASK, Column
from targetd.ctl.resources import Resource, field_name
from targetd.system.logs import clean

__all__ = [
    "MASK",
    "as_json",
    "details",
    "line",
    "made_table",
    "mask",
    "resource_details",
    "resource_table",
    "size",
    "table",
]

UNBOUNDED = 10_000
"""Columns of a page that is no terminal: lines there are for programs and are not broken."""


def as_json(value: object) -> None:
    """Print as JSON, with what the API calls things."""
    print(json.dumps(value, indent=2))


def _cell(value: object) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(clean(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{clean(name)}={clean(item)}" for name, item in value.items())
    return clean(value)


def line(values: Mapping[str, object]) -> str:
    """Names and values on one line."""
    return _cell(dict(values)) if values else ""


def mask(column: Column, value: object) -> object:
    """The value, unless it is a secret."""
    return MASK if column.secret and value else value


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of at least one."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")


def made_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Any:
    """A table of rich's."""
    # Only who prints a table waits for rich.
    from rich.table import Table
    from rich.text import Text

    made = Table(*headings, box=None, pad_edge=False, header_style="bold", show_edge=False)
    for row in rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; where standard output is no terminal, without colours and line breaks."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else UNBOUNDED
    Console(width=width, highlight=False, markup=False).print(made_table(headings, rows))


def details(values: Mapping[str, object]) -> None:
    """Print names and values, one a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {_cell(value)}")


def resource_details(resource: Resource, shown: Mapping[str, Any]) -> None:
    """Print one object whole, secrets masked."""
    values: dict[str, object] = {"id": shown["id"]} if resource.key else {}
    for column in resource.outputs:
        values[field_name(column)] = mask(column, shown.get(column.wire))
    details(values)


def resource_table(resource: Resource, objects: Sequence[Mapping[str, Any]], *, every: bool) -> None:
    """Print objects, one a row: what names them, what must be given, and what differs from its default.

    Args:
        every: all columns instead.
    """
    columns = [
        column
        for column in resource.outputs
        if every or (not column.secret and _tells(resource, column, objects))
    ]
    headings = ["id", *(field_name(column) for column in columns)]
    table(
        headings,
        ([shown["id"], *(mask(column, shown.get(column.wire)) for column in columns)] for shown in objects),
    )


def _tells(resource: Resource, column: Column, objects: Sequence[Mapping[str, Any]]) -> bool:
    if column.attribute in resource.key or column.required:
        return True
    ordinary: tuple[object, ...] = (column.json_schema.get("default"), None, "", [])
    return any(shown.get(column.wire) not in ordinary for shown in objects)
