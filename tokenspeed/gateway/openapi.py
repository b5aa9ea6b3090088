# SPDX-License-Identifier: MIT
"""The OpenAPI 3.1 document, made from the route table and the request types. Knows no handler."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenspeed import __version__
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.app import Call, RouteSpec, encode_json
from tokenspeed.gateway.tenants import ROLES

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

# Of routes whose errors have a look of their own, which is Anthropic's.
_TYPED_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


def openapi_route(table: Sequence[RouteSpec]) -> RouteSpec:
    """The route that serves the document of `table` and of itself."""

    async def handler(call: Call) -> None:
        await call.reply(body)

    spec = RouteSpec("GET", "/openapi.json", handler, "This document", roles=ROLES)
    body = encode_json(document([*table, spec]))
    return spec


def document(table: Sequence[RouteSpec]) -> dict[str, Any]:
    """The document as an object."""
    types = {spec.body for spec in table if spec.body is not None}
    refs = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(sorted(types, key=str), ref_template=refs)
    paths: dict[str, Any] = {}
    for spec in table:
        path = spec.path.replace(":path}", "}")
        paths.setdefault(path, {})[spec.method.lower()] = _operation(spec, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "TokenSpeed", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR, "TypedError": _TYPED_ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(spec: RouteSpec, path: str) -> dict[str, Any]:
    name = "Error" if spec.failure is ApiError.body else "TypedError"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    anything: dict[str, Any] = {"application/json": {"schema": {}}}
    if spec.path == "/metrics":
        anything = {"text/plain": {"schema": {"type": "string"}}}
    if spec.path == "/dashboard":
        anything = {"text/html": {"schema": {"type": "string"}}}
    if spec.path == "/dashboard/files/{file}":
        anything = {"text/css": {"schema": {}}, "text/javascript": {"schema": {}}}
    if spec.path == "/dashboard/events":
        anything = {"text/event-stream": {"schema": {}}}
    if spec.metered or "{response_id}" in path:
        anything["text/event-stream"] = {"schema": {}}
    made: dict[str, Any] = {
        "summary": spec.summary,
        "responses": {
            "200": {"description": "The answer", "content": anything},
            "4XX": {"description": "The caller's mistake, by name", "content": error},
            "503": {"description": "Not now; see Retry-After", "content": error},
        },
    }
    if not spec.open:
        made["security"] = [{"bearer": []}, {"apiKey": []}]
    schema = {"type": "string", "minLength": 1}
    for name in re.findall(r"{(\w+)}", path):
        place = {"name": name, "in": "path", "required": True, "schema": schema}
        made.setdefault("parameters", []).append(place)
    if spec.body is not None:
        ref = {"$ref": f"#/components/schemas/{spec.body.__name__}"}
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": ref}}}
    return made
