"""The OpenAPI 3.1 document and the page that shows it, both made from the declarations and the routes.

The page is plain HTML without scripts or anything from elsewhere, so that it can be read on a storage
network that reaches nothing.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from html import escape
from typing import Any, Final

from aiohttp import web

from api.bodies import DEFAULT_LIMIT
from api.document import schemas as document_schemas
from api.fields import DECLARATIONS
from api.resources.collection import PREFIX
from api.resources.system import HEALTH_PATH
from api.routing import Operation, Router
from targetd.interface import (
    MAX_SANITIZE_PASSES,
    SANITIZE_METHODS,
    Explanation,
    LoginFailure,
    SessionStatus,
    Statistics,
    Work,
)
from targetd.system.threads import run_in_thread

__all__ = ["Documents", "document"]

_INTRODUCTION: Final = """\
The FreeNAS API v1.0 for iSCSI. Every change is in force when it is answered, all of it or none of it.

Numbers and booleans may be sent as strings; null, and "" for a number, mean "not given"; unknown keys are \
ignored; what a PUT leaves out keeps its value. A final slash may be left out.

What happens can be followed as server-sent events (text/event-stream) at \
/api/v1.0/services/iscsi/events/; that answer has no end, so it is not among the operations below.
"""

_NUMBER_QUERY: Final = {"type": "integer", "minimum": 0}

_PARAMETERS: Final[dict[str, Any]] = {
    "limit": {
        "name": "limit",
        "in": "query",
        "description": "Objects in the answer; 0 = all.",
        "schema": {**_NUMBER_QUERY, "default": DEFAULT_LIMIT},
    },
    "offset": {
        "name": "offset",
        "in": "query",
        "description": "Objects to leave out at the start.",
        "schema": {**_NUMBER_QUERY, "default": 0},
    },
    "secrets": {
        "name": "secrets",
        "in": "query",
        "description": "`masked`: secrets are shown as `***`, and a PUT takes that for unchanged. "
        "Read-only users never get them in clear.",
        "schema": {"type": "string", "enum": ["shown", "masked"], "default": "shown"},
    },
    "force": {
        "name": "force",
        "in": "query",
        "description": "1: change the block size, medium or size of an extent though initiators that are "
        "logged in rely on it. Commands under way are ended, and all are told by unit attention.",
        "schema": {"type": "integer", "enum": [0, 1], "default": 0},
    },
    "strict": {
        "name": "strict",
        "in": "query",
        "description": "1: refuse fields that are not known, as with the header `Prefer: handling=strict`.",
        "schema": {"type": "integer", "enum": [0, 1], "default": 0},
    },
    "dry_run": {
        "name": "dry_run",
        "in": "query",
        "description": "1: say what would change, or be refused, and change nothing.",
        "schema": {"type": "integer", "enum": [0, 1], "default": 0},
    },
    "delete": {
        "name": "delete",
        "in": "query",
        "description": "1: delete what the document does not name; files stay.",
        "schema": {"type": "integer", "enum": [0, 1], "default": 0},
    },
    "initiator": {
        "name": "initiator",
        "in": "query",
        "required": True,
        "description": "iSCSI name of the initiator.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 223},
    },
    "address": {
        "name": "address",
        "in": "query",
        "required": True,
        "description": "IP address that it comes from.",
        "schema": {"type": "string"},
    },
    "target": {
        "name": "target",
        "in": "query",
        "description": "Full or short name of a target; without it all are asked.",
        "schema": {"type": "string"},
    },
    "portal": {
        "name": "portal",
        "in": "query",
        "description": "Id of a portal; without it all are asked.",
        "schema": {"type": "integer", "minimum": 1},
    },
}


def _object(properties: dict[str, Any], description: str = "") -> dict[str, Any]:
    return {
        "type": "object",
        **({"description": description} if description else {}),
        "properties": properties,
        "required": list(properties),
    }


_TEXT: Final = {"type": "string"}
_BYTES: Final = {"type": "integer", "description": "Bytes."}
_DATASET: Final = _object(
    {"name": _TEXT, "pool": _TEXT, "avail": _BYTES, "used": _BYTES, "mountpoint": _TEXT}
)
_VOLUME_SIZE: Final = {
    "type": ["string", "integer"],
    "description": "Bytes, or a number with K, M, G, T or P (powers of 1024): 10G, 500MiB.",
}
_STATISTICS_HINTS: Final = typing.get_type_hints(Statistics)
_STATISTICS_OF_MANY: Final = [
    name for name, hint in _STATISTICS_HINTS.items() if typing.get_origin(hint) is tuple
]
"""What ``Statistics`` has lists of; all else is numbers, and a few texts."""

_KEY: Final[dict[str, Any]] = {
    "id": {"type": "integer", "minimum": 1},
    "name": _TEXT,
    "role": {"type": "string", "enum": ["admin", "read-only"]},
    "created_at": {"type": "number", "description": "Seconds since the epoch."},
    "expires_at": {"type": ["number", "null"]},
    "used_at": {"type": ["number", "null"]},
}
_FIXED_SCHEMAS: Final[dict[str, Any]] = {
    "Error": {
        "type": "object",
        "description": "error: malformed; error_message: it could not be carried out.",
        "properties": {"error": _TEXT, "error_message": _TEXT},
    },
    "FieldErrors": {
        "type": "object",
        "description": "Messages by field; __all__ for what concerns several.",
        "additionalProperties": {"type": "array", "items": _TEXT},
    },
    "ExtentDelete": {
        "type": "object",
        "properties": {
            "delete": {
                "type": ["boolean", "null"],
                "default": False,
                "description": "Remove the backing file too.",
            }
        },
    },
    "Sanitize": {
        "type": "object",
        "properties": {
            "method": {"type": "string", "enum": list(SANITIZE_METHODS)},
            "passes": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": MAX_SANITIZE_PASSES,
                "default": 1,
                "description": "Of an overwrite with zeroes.",
            },
        },
        "required": ["method"],
    },
    "Version": _object({"fullversion": _TEXT, "name": _TEXT, "version": _TEXT}),
    "Health": _object({"status": _TEXT}),
    "Service": _object(
        {
            "id": {"type": "integer"},
            "srv_service": _TEXT,
            "srv_enable": {"type": "boolean"},
            "srv_state": {"type": "string", "enum": ["RUNNING", "STOPPED"]},
        }
    ),
    "Dataset": _DATASET,
    "Pool": _object(
        {
            "id": {"type": "integer"},
            "name": _TEXT,
            "vol_name": _TEXT,
            "vol_fstype": _TEXT,
            "avail": _BYTES,
            "used": _BYTES,
            "used_pct": {"type": "integer"},
            "mountpoint": _TEXT,
            "status": _TEXT,
            "children": {"type": "array", "items": _DATASET},
        }
    ),
    "Volume": _object({"name": _TEXT, "volsize": _BYTES, "used": _BYTES, "refer": _BYTES, "avail": _BYTES}),
    "VolumeCreate": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "Of the volume; slashes make directories."},
            "volsize": _VOLUME_SIZE,
            "sparse": {
                "type": ["boolean", "null"],
                "default": True,
                "description": "False: the space must be free, and ZFS reserves it.",
            },
        },
        "required": ["name", "volsize"],
    },
    "VolumeUpdate": {"type": "object", "properties": {"volsize": _VOLUME_SIZE}},
    "VolumeDelete": {
        "type": "object",
        "properties": {
            "cascade": {
                "type": ["boolean", "null"],
                "default": False,
                "description": "With the snapshots of a ZFS volume.",
            }
        },
    },
    "User": _object({"name": _TEXT, "read_only": {"type": "boolean"}}),
    "UserCreate": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 32},
            "password": {"type": "string", "minLength": 8, "maxLength": 256},
            "read_only": {"type": ["boolean", "null"], "default": False},
        },
        "required": ["name", "password"],
    },
    "UserUpdate": {
        "type": "object",
        "properties": {
            "password": {"type": ["string", "null"], "minLength": 8, "maxLength": 256},
            "read_only": {"type": ["boolean", "null"]},
        },
    },
    "Done": {"type": "string"},
    "Snapshot": _object(
        {
            **dict.fromkeys(("id", "fullname", "filesystem", "name"), _TEXT),
            "parent_type": {"type": "string", "enum": ["volume", "filesystem"]},
            "mostrecent": {"type": "boolean"},
            "used": _BYTES,
            "refer": _BYTES,
        }
    ),
    "SnapshotCreate": _object({"dataset": _TEXT, "name": _TEXT}),
    "SnapshotClone": _object({"name": _TEXT}),
    "FileSystem": _object(
        {
            **dict.fromkeys(("name", "pool", "mountpoint", "comments"), _TEXT),
            **dict.fromkeys(("avail", "used", "refer"), _BYTES),
        }
    ),
    "FileSystemCreate": _object({"name": _TEXT}),
    "ApiKey": _object(_KEY),
    "ApiKeyCreated": _object({**_KEY, "key": {"type": "string", "description": "Shown this once."}}),
    "ApiKeyCreate": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 64},
            "role": {"type": "string", "enum": ["admin", "read-only"], "default": "admin"},
            "expires_in_s": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 315360000},
        },
        "required": ["name"],
    },
    "Statistics": {
        "type": "object",
        "properties": {
            **{name: {"type": "array", "items": {"type": "object"}} for name in _STATISTICS_OF_MANY},
            **{name: {"type": "string"} for name, hint in _STATISTICS_HINTS.items() if hint is str},
        },
        "required": [*_STATISTICS_OF_MANY],
        "additionalProperties": {"type": "number"},
    },
    "ServiceUpdate": _object({"srv_enable": {"type": "boolean"}}),
}


def _plain_schema(hint: Any) -> dict[str, Any]:
    """The schema of the plain data that the engine hands out."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [_plain_schema(part)["type"] for part in arguments]
        return {"type": kinds}
    if origin is tuple:
        return {"type": "array", "items": _plain_schema(arguments[0])}
    if origin is dict:
        return {"type": "object"}
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return _object({item.name: _plain_schema(hints[item.name]) for item in dataclasses.fields(hint)})
    names: dict[Any, str] = {
        int: "integer",
        float: "number",
        str: "string",
        bool: "boolean",
        types.NoneType: "null",
    }
    return {"type": names[hint]}


def document(router: Router, version: str) -> dict[str, Any]:
    """The OpenAPI document of everything that the router knows."""
    schemas: dict[str, Any] = {}
    for declaration in DECLARATIONS:
        schemas.update(declaration.schemas())
    schemas.update(document_schemas())
    schemas["Session"] = {**_plain_schema(SessionStatus), "description": "Ages in seconds, lengths in bytes."}
    schemas["LoginFailure"] = _plain_schema(LoginFailure)
    schemas["Explanation"] = _plain_schema(Explanation)
    schemas["Work"] = {**_plain_schema(Work), "description": "Bytes done, of bytes in all."}
    schemas.update(_FIXED_SCHEMAS)
    paths = dict(router.documented())
    for path, item in paths.items():
        if path == HEALTH_PATH:
            for operation in item.values():
                operation["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "iscsi-targetd",
            "version": version,
            "description": _INTRODUCTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"basic": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "parameters": _PARAMETERS,
            "securitySchemes": {"basic": {"type": "http", "scheme": "basic"}},
        },
    }


class Documents:
    """Serves both, made when first asked for, after all routes are known."""

    def __init__(self, router: Router, version: str) -> None:
        self._router = router
        self._version = version
        self._made: dict[str, Any] | None = None
        self._texts: dict[Callable[[dict[str, Any]], str], bytes] = {}

    def register(self, router: Router) -> None:
        """Add the two places."""
        router.add(
            "documents",
            f"{PREFIX}openapi.json",
            {"GET": Operation(self.get_document, "This document.", {200: None, 401: None})},
        )
        router.add(
            "documents",
            "/api/docs",
            {"GET": Operation(self.get_page, "This document as a page.", {200: None, 401: None})},
        )

    @property
    def made(self) -> dict[str, Any]:
        """The document."""
        if self._made is None:
            self._made = document(self._router, self._version)
        return self._made

    async def get_document(self, request: web.Request) -> web.StreamResponse:
        """GET of the JSON."""
        return web.Response(body=await self._written(json.dumps), content_type="application/json")

    async def get_page(self, request: web.Request) -> web.StreamResponse:
        """GET of the page."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
        return web.Response(
            body=await self._written(_page),
            content_type="text/html",
            charset="utf-8",
            headers={"Content-Security-Policy": policy},
        )

    async def _written(self, write: Callable[[dict[str, Any]], str]) -> bytes:
        """One of the two, written once, on a thread: it takes tens of milliseconds."""
        if write not in self._texts:
            self._texts[write] = (await run_in_thread(lambda: write(self.made))).encode()
        return self._texts[write]


# -- The page ------------------------------------------------------------------------------------------

_STYLE: Final = """\
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
h2{margin:2.5rem 0 .5rem;border-bottom:1px solid #8886}
summary{cursor:pointer;padding:.25rem 0}
details>details,details>table,details>p{margin-left:1.5rem}
code{font:14px ui-monospace,monospace}
b.method{display:inline-block;min-width:4.5rem;font:bold 14px ui-monospace,monospace}
.GET{color:#1769aa}.POST{color:#2e7d32}.PUT,.PATCH{color:#b26a00}.DELETE{color:#c62828}
table{border-collapse:collapse;margin:.5rem 0 1rem}
td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0;border-top:1px solid #8884}
th{font-weight:600}nav a{margin-right:1rem}
"""


def _page(made: dict[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for path, item in made["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                groups.setdefault(operation["tags"][0], []).append(_operation(made, path, method, operation))
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a> ' for name in groups)
    sections = "".join(
        f'<h2 id="{escape(name)}">{escape(name)}</h2>{"".join(parts)}' for name, parts in groups.items()
    )
    info = made["info"]
    introduction = "".join(f"<p>{escape(text)}</p>" for text in info["description"].strip().split("\n\n"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>{introduction}"
        f'<p><a href="{PREFIX}openapi.json">OpenAPI 3.1 document</a></p><nav>{links}</nav>{sections}'
        "</body></html>\n"
    )


def _operation(made: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    method = method.upper()
    parts = []
    names = [reference["$ref"].rpartition("/")[2] for reference in operation.get("parameters", ())]
    if names:
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td>{escape(_PARAMETERS[name]['description'])}</td></tr>"
            for name in names
        )
        parts.append(f"<table><tr><th>query</th><th></th></tr>{rows}</table>")
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        parts.append(_schema_table(made, schema, "body"))
    for status, response in operation["responses"].items():
        parts.append(f"<p><b>{status}</b> {escape(response['description'])}</p>")
        if "content" in response:
            schema = response["content"]["application/json"]["schema"]
            parts.append(_schema_table(made, schema, "returned"))
    return (
        f'<details><summary><b class="method {method}">{method}</b> <code>{escape(path)}</code> '
        f"{escape(operation['summary'])}</summary>{''.join(parts)}</details>"
    )


def _schema_table(made: dict[str, Any], schema: dict[str, Any], title: str) -> str:
    if schema.get("type") == "array":
        return _schema_table(made, schema["items"], f"{title}, a list of")
    name = schema["$ref"].rpartition("/")[2]
    found = made["components"]["schemas"][name]
    required = found.get("required", ()) if title == "body" else ()
    rows = []
    for key, part in found.get("properties", {}).items():
        mark = " (required)" if key in required else ""
        rows.append(
            f"<tr><td><code>{escape(key)}</code>{mark}</td><td>{escape(_kind(part))}</td>"
            f"<td>{escape(part.get('description', ''))}</td></tr>"
        )
    head = f"<summary>{title} {escape(name)}</summary>"
    described = f"<p>{escape(found['description'])}</p>" if "description" in found else ""
    table = f"<table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table>" if rows else ""
    return f"<details>{head}{described}{table}</details>"


def _kind(part: dict[str, Any]) -> str:
    """Type, bounds and default in a few words."""
    kind = part.get("type", "")
    words = [" or ".join(kind) if isinstance(kind, list) else str(kind)]
    if "enum" in part:
        words.append("one of " + ", ".join(json.dumps(choice) for choice in part["enum"]))
    if "minimum" in part and "maximum" in part:
        words.append(f"{part['minimum']} to {part['maximum']}")
    if "maxLength" in part:
        words.append(f"at most {part['maxLength']} characters")
    if "default" in part:
        words.append(f"default {json.dumps(part['default'])}")
    if part.get("readOnly"):
        words.append("read only")
    return ", ".join(words)
