"""The whole configuration as one TOML document: export, difference, import.

What stands in it and what it means is ``api.document``'s; the daemon reads it, judges it and carries it
out as one change, so that an import is in force as a whole or not at all.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from targetd.ctl.client import Client, CtlError
from targetd.ctl.output import MASK

__all__ = ["FORCE", "FORCIBLE", "SERVICE_PATH", "carry_out", "dumps", "export", "lines", "loads"]

CONFIG_PATH = "config/"
SERVICE_PATH = "services/services/iscsitarget/"

FORCIBLE = frozenset(("extent", "target"))
"""Resources whose changes may be refused while initiators are logged in."""
FORCE = "?force=1"


def export(client: Client, *, secrets: bool = True) -> dict[str, Any]:
    """The document of what the daemon has. It holds the CHAP secrets unless ``secrets`` is False."""
    found = client.request("GET", CONFIG_PATH if secrets else f"{CONFIG_PATH}?secrets=masked")
    if not isinstance(found, dict):
        raise CtlError(f"{client.url} answers {CONFIG_PATH} with no document; is this iscsi-targetd?")
    return found


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
        CtlError: it is none.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CtlError(f"{name}: {error}") from None
    # dates and times are texts to everybody else
    plain: dict[str, Any] = json.loads(json.dumps(document, default=str))
    return plain


def carry_out(
    client: Client,
    document: Mapping[str, Any],
    *,
    delete: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Make the daemon's configuration that of the document: all of it, or nothing.

    Args:
        delete: also delete what the document does not name.
        force: also what is refused while initiators are logged in.
        dry_run: only have it judged.

    Returns:
        What changes, one dict an object; secrets are masked.

    Raises:
        CtlError: it was refused, and nothing has changed.
    """
    query = {"delete": int(delete), "force": int(force), "dry_run": int(dry_run)}
    answer = client.request("POST", f"{CONFIG_PATH}?{urlencode(query)}", dict(document))
    changes: list[dict[str, Any]] = answer["changes"]
    return changes


def lines(change: Mapping[str, Any]) -> list[str]:
    """One of them, for people."""
    title = " ".join([change["resource"], "/".join(map(str, change["key"]))]).strip()
    told = [f"{ {'create': '+', 'update': '~', 'delete': '-'}[change['action']] } {title}"]
    for name, pair in change["changes"].items():
        before, after = (MASK if value == MASK else _toml(value) for value in pair)
        told.append(
            f"    {name} = {after}" if change["action"] == "create" else f"    {name}: {before} -> {after}"
        )
    return told
