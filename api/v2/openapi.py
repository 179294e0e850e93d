"""The OpenAPI document of REST v2.0, made from the table of methods."""

from typing import Any

from pydantic import TypeAdapter

from api.v2.methods import REQUIRED, Method, Table
from api.v2.query import PARAMETERS

__all__ = ["document"]

_ERROR = {"type": "object", "properties": {"message": {"type": "string"}, "errno": {"type": "integer"}}}


def _schema(kind: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")


def document(table: Table, version: str) -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for method in table:
        if method.rest is not None:
            verb, path = method.rest
            paths.setdefault(f"/api/v2.0{path}", {})[verb.lower()] = _operation(method, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "iscsi-targetd, TrueNAS REST v2.0", "version": version},
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic"},
                "key": {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{"basic": []}, {"key": []}],
        "paths": paths,
    }


def _body(method: Method, schemas: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of the request body; None: it has none."""
    assert method.rest is not None
    rest = method.parameters["{id}" in method.rest[1] :]
    if method.rest[0] == "GET" or not rest:
        return None
    found = {}
    for parameter in rest:
        schema = _schema(parameter.kind)
        schemas |= schema.pop("$defs", {})
        found[parameter.name] = schema
    if len(rest) == 1:
        return found[rest[0].name]
    required = [parameter.name for parameter in rest if parameter.default is REQUIRED]
    return {"type": "object", "properties": found, "required": required, "additionalProperties": False}


def _operation(method: Method, schemas: dict[str, Any]) -> dict[str, Any]:
    assert method.rest is not None
    json = "application/json"
    error = {"content": {json: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    operation: dict[str, Any] = {
        "operationId": method.name.replace(".", "_"),
        "summary": method.summary,
        "tags": [method.name.rpartition(".")[0]],
        "responses": {
            "200": {"description": "Done, and in force.", "content": {json: {"schema": {}}}},
            "401": {"description": "No credentials, or wrong ones."},
            "403": {"description": "This account may only read.", **error},
            "404": {"description": "There is no such object.", **error},
            "422": {"description": "It cannot be done: a message, or messages by field."},
            "429": {"description": "Too many failed logins from this address."},
        },
    }
    parameters: list[dict[str, Any]] = []
    if "{id}" in method.rest[1]:
        kind = {"type": "integer"} if method.parameters[0].kind is int else {"type": "string", "minLength": 1}
        parameters.append({"name": "id", "in": "path", "required": True, "schema": kind})
    if method.parameters == PARAMETERS:
        parameters += [
            {"name": name, "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 2**31}}
            for name in ("limit", "offset")
        ]
    if parameters:
        operation["parameters"] = parameters
    body = _body(method, schemas)
    if body is not None:
        optional = all(one.default is not REQUIRED for one in method.parameters["{id}" in method.rest[1] :])
        operation["requestBody"] = {"required": not optional, "content": {json: {"schema": body}}}
    return operation
