# SPDX-License-Identifier: MIT
"""Which types of JSON a tool's parameter may have, by the tool's JSON schema. Validates nothing.

Whatever cannot be read (malformed schemas, `$ref` that leads nowhere, too deep) allows everything.
A schema is looked at once, so recursive ones end.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tokenspeed.text.conversation import Tool

KINDS = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
_MAX_DEPTH = 32
_UNIONS = ("anyOf", "oneOf")
# What people write where JSON schema has another word.
_ALIASES = {
    **dict.fromkeys(("str", "text", "char", "enum"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "long", "short"), "integer"),
    **dict.fromkeys(("float", "double", "decimal"), "number"),
    **dict.fromkeys(("dict", "map", "hashmap"), "object"),
    **dict.fromkeys(("list", "tuple", "set", "arraylist"), "array"),
    "bool": "boolean",
    "none": "null",
    **{kind: kind for kind in KINDS},
}
# Types that a schema without `type` is about.
_HINTS = {"properties": "object", "items": "array", "prefixItems": "array", "pattern": "string"}


def kinds_of(tools: Sequence[Tool], name: str, key: str) -> frozenset[str]:
    """Types that parameter `key` of tool `name` may have; all where that is not said."""
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is None:
        return KINDS
    if tool.custom:
        return frozenset({"string"})
    found = next(_properties(tool.parameters, tool.parameters, key, set(), 0), None)
    if found is None:
        return KINDS
    return _kinds(found, tool.parameters, set(), 0) or KINDS


def _properties(schema: Any, root: Any, key: str, seen: set[int], depth: int) -> Iterator[Any]:
    """Schemas of property `key`, wherever `schema` speaks of it."""
    if not isinstance(schema, dict) or id(schema) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(schema))
    properties = schema.get("properties")
    if isinstance(properties, dict) and key in properties:
        yield properties[key]
    parts = [_target(schema.get("$ref"), root)]
    for word in ("allOf", *_UNIONS):
        branches = schema.get(word)
        parts += branches if isinstance(branches, list) else []
    for part in parts:
        yield from _properties(part, root, key, seen, depth + 1)
    if "additionalProperties" in schema:
        yield schema["additionalProperties"]


def _kinds(schema: Any, root: Any, seen: set[int], depth: int) -> frozenset[str]:
    """Empty if the schema only leads back to one that is being looked at: it adds nothing."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return KINDS
    if id(schema) in seen:
        return frozenset()
    seen.add(id(schema))
    limits = []
    if "$ref" in schema:
        limits.append(_kinds(_target(schema["$ref"], root), root, seen, depth + 1))
    for word in _UNIONS:
        branches = schema.get(word)
        if isinstance(branches, list) and branches:
            parts = [_kinds(branch, root, seen, depth + 1) for branch in branches]
            limits.append(frozenset().union(*parts))
    branches = schema.get("allOf")
    for branch in branches if isinstance(branches, list) else []:
        limits.append(_kinds(branch, root, seen, depth + 1))
    allowed = _own(schema)
    for limit in limits:
        allowed = allowed & limit or allowed  # a contradiction allows what the first did
    if allowed == KINDS and frozenset() in limits:
        return frozenset()
    return allowed | {"null"} if schema.get("nullable") is True else allowed


def _own(schema: dict[str, Any]) -> frozenset[str]:
    """By `type`, `const`, `enum` and keywords that only one type has."""
    listed = schema.get("type")
    names = [listed] if isinstance(listed, str) else listed
    if isinstance(names, list):
        words = [name.lower() for name in names if isinstance(name, str)]
        known = frozenset(_ALIASES[word] for word in words if word in _ALIASES)
        if known:
            return known
    if "const" in schema:
        return frozenset({_kind(schema["const"])})
    values = schema.get("enum")
    if isinstance(values, list) and values:
        return frozenset(map(_kind, values))
    hints = frozenset(kind for word, kind in _HINTS.items() if word in schema)
    return hints or KINDS


def _kind(value: Any) -> str:
    """The type of a JSON value."""
    names = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object"}
    return "null" if value is None else names.get(type(value), "array")


def _target(ref: Any, root: Any) -> Any:
    """What a local `$ref` points to, or None. Source: RFC 6901."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    found = root
    for part in ref[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(part)
        elif isinstance(found, list) and part.isdecimal() and len(part) < 6:
            found = found[int(part)] if int(part) < len(found) else None
        else:
            return None
    return found
