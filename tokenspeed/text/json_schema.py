# SPDX-License-Identifier: MIT
"""JSON schemas from clients: refuses what the compiler would drop silently, and narrows the rest.

What comes out allows all of what went in or a part: whatever fits the result fits the schema.
Without recursion, so nesting costs nothing but the depth that is refused. Compiles nothing.

Read as xgrammar 0.2 does it. Accepted and known to be looser: `oneOf` is read as `anyOf`; a
`format` that is not a standard's is a remark; `required` names need not stand in `properties`.
"""

import json
from collections.abc import Iterator
from typing import Any

from tokenspeed.errors import RequestError
from tokenspeed.text.regexes import check_regex, in_json_string

MAX_BYTES = 256 * 1024  # of a specification as JSON
MAX_DEPTH = 64  # objects and lists in one another

_DROPPED = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
    *("uniqueItems", "contains", "minContains", "maxContains", "additionalItems"),
    *("$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor"),
)
_OF_TYPE = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"),
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
    ),
}
_LIMITS = {name for names in _OF_TYPE.values() for name in names} | {"enum", "const", "type"}
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONES = (
    *("items", "additionalProperties", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
    "number": (int, float),
    "integer": (int,),
}


def check_size(value: Any, field: str) -> str:
    """The value as JSON. `RequestError` if that is too long, too deep or no JSON at all."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _limit(field, f"at most {MAX_DEPTH} objects and lists in one another")
        level = [child for one in level for child in _children(one)]
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (ValueError, TypeError):
        raise RequestError(f"{field}: is no JSON", field=field, code="invalid_grammar") from None
    if size > MAX_BYTES:
        raise _limit(field, f"at most {MAX_BYTES} bytes, got {size}")
    return text


def narrowed(schema: Any, field: str, *, raw_texts: bool = False) -> Any:
    """A copy that the compiler takes at its word. `RequestError` for what it does not know.

    `raw_texts`: the properties' texts are written without quotes, as in tags.
    """
    made = json.loads(check_size(schema, field))
    if not isinstance(made, dict | bool):
        raise _refusal(field, "a schema is an object, true or false")
    raw = set(map(id, _properties(made))) if raw_texts else set()
    todo = [made]
    while todo:
        one = todo.pop()
        if isinstance(one, bool):
            continue
        if not isinstance(one, dict):
            raise _refusal(field, "a schema is an object, true or false")
        _narrow(one, field, quoted=id(one) not in raw)
        todo += _subschemas(one, field)
    return made


def _narrow(schema: dict[str, Any], field: str, *, quoted: bool) -> None:
    for name in _DROPPED:
        if schema.get(name) not in (None, False):
            raise _refusal(field, f"the schema's `{name}` is not supported")
    _narrow_branches(schema, field)
    _narrow_type(schema, field)
    kinds = schema.get("type")
    if (kinds == "array" and "items" not in schema) and "prefixItems" not in schema:
        schema["items"] = {}
    if "object" in (kinds if isinstance(kinds, list) else [kinds]):
        _declare_required(schema, field)
    if "pattern" in schema:
        pattern = check_regex(schema["pattern"], field)
        if "minLength" in schema or "maxLength" in schema:
            raise _refusal(field, "the schema's `pattern` with `minLength` or `maxLength`")
        schema["pattern"] = in_json_string(pattern) if quoted else pattern
    for name in schema.get("patternProperties") or ():
        check_regex(name, field)


def _narrow_branches(schema: dict[str, Any], field: str) -> None:
    """Where the compiler follows one keyword it sees no other."""
    branches = [name for name in ("$ref", "anyOf", "oneOf", "allOf") if name in schema]
    if not branches:
        return
    name = branches[0]
    beside = branches[1:] + sorted(_LIMITS & schema.keys())
    if name != "$ref" and beside == ["type"] and _fits_branches(schema, name):
        del schema["type"]
    elif beside:
        raise _refusal(field, f"the schema's `{name}` beside `{beside[0]}` is not supported")
    if name == "$ref":
        ref = schema["$ref"]
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise _refusal(field, "a `$ref` leads to a place in the same schema")
    elif not isinstance(schema[name], list) or not schema[name]:
        raise _refusal(field, f"the schema's `{name}` is a list of schemas")
    elif name == "allOf" and len(schema[name]) > 1:
        raise _refusal(field, "the schema's `allOf` of several schemas is not supported")


def _fits_branches(schema: dict[str, Any], name: str) -> bool:
    """Whether the type beside the branches goes without saying."""
    branches, kind = schema[name], schema["type"]
    if not isinstance(branches, list) or not isinstance(kind, str):
        return False
    for branch in branches:
        if not isinstance(branch, dict) or branch.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
            return False
        branch.setdefault("type", kind)
    return all(branch["type"] == kind for branch in branches)


def _narrow_type(schema: dict[str, Any], field: str) -> None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        if not isinstance(values, list) or not values:
            raise _refusal(field, "the schema's `enum` is a list of values")
        values = [value for value in values if _is(value, schema.get("type"))]
        if not values:
            raise _refusal(field, "no value of the schema's `enum` or `const` has its `type`")
        for name in _LIMITS & schema.keys():
            if name not in ("enum", "const", "type"):
                raise _refusal(field, f"the schema's `enum` or `const` beside `{name}`")
        schema.pop("const", None)
        schema.pop("type", None)
        schema["enum"] = values
    elif "type" not in schema:
        named = [kind for kind, names in _OF_TYPE.items() if schema.keys() & set(names)]
        if len(named) > 1:
            raise _refusal(field, f"the schema speaks of {named[0]} and {named[1]}: give its type")
        if named:
            schema["type"] = named[0]


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return any(_is(value, one) for one in kind)
    if not isinstance(kind, str) or kind not in _TYPES:
        return kind is None
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, _TYPES[kind])


def _declare_required(schema: dict[str, Any], field: str) -> None:
    """The compiler asks only for names that it has seen among the properties."""
    required = schema.get("required") or []
    properties = schema.setdefault("properties", {}) if required else schema.get("properties") or {}
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _refusal(field, "the schema's `required` is a list of names")
    if not isinstance(properties, dict):
        raise _refusal(field, "the schema's `properties` is an object")
    missing = [name for name in required if name not in properties]
    if not missing:
        return
    others = schema.get("additionalProperties", True)
    if others is False or schema.get("patternProperties"):
        raise _refusal(field, f"the schema requires {missing[0][:50]!r} but does not describe it")
    properties.update({name: json.loads(json.dumps(others)) for name in missing})


def _properties(schema: Any) -> Iterator[Any]:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return iter(found.values() if isinstance(found, dict) else ())


def _subschemas(schema: dict[str, Any], field: str) -> Iterator[Any]:
    for name in _MAPS:
        if schema.get(name) is not None:
            if not isinstance(schema[name], dict):
                raise _refusal(field, f"the schema's `{name}` is an object")
            yield from schema[name].values()
    for name in _LISTS:
        if schema.get(name) is not None:
            if not isinstance(schema[name], list):
                raise _refusal(field, f"the schema's `{name}` is a list of schemas")
            yield from schema[name]
    yield from (schema[name] for name in _ONES if schema.get(name) is not None)


def _children(value: Any) -> list[Any]:
    """What is nested in a value; plain values are nobody's level."""
    if isinstance(value, dict):
        listed = list(value.values())
    elif isinstance(value, list | tuple):
        listed = list(value)
    else:
        return []
    return [child for child in listed if isinstance(child, dict | list | tuple)]


def _refusal(field: str, why: str) -> RequestError:
    return RequestError(f"{field}: {why}", field=field, code="invalid_grammar")


def _limit(field: str, why: str) -> RequestError:
    return RequestError(f"{field}: {why}", field=field, code="grammar_limit")
