# SPDX-License-Identifier: MIT
"""Random JSON schemas whose values are short, and whether a value fits one. For tests and figures.

The check is written anew, from the specification, so that it shares no mistake with the compiler.
"""

import random
from typing import Any

_WORDS = ("name", "id", "path", "tags", "size", "user", "items", "é", 'q"', "a b", "x-1", "value")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """An object's schema, as clients send them for answers."""
    names = rng.sample(_WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.8],
        "additionalProperties": False,
    }


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "anyOf", "list"]
    kinds += ["array", "object"] if depth > 0 else []
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 8)}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 99)}
        case "enum":
            return {"enum": rng.sample(["a", "b b", 'c"', 1, None, True, [1], {"k": "v"}], 3)}
        case "const":
            return {"const": rng.choice(["x", 5, False, {"y": []}])}
        case "anyOf" if depth > 0:
            return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "list":
            return {"type": ["boolean", "null"]}
        case "array":
            high = rng.randint(0, 3)
            low = rng.randint(0, high)
            items = _schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": high}
        case "object":
            return random_schema(rng, depth)
        case kind if kind in ("boolean", "null"):
            return {"type": kind}
    return {"type": "boolean"}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value is valid under a schema of the kinds above."""
    if "anyOf" in schema:
        return any(fits(value, branch) for branch in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(_same(value, one) for one in schema.get("enum", [schema.get("const")]))
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if _kind(value) not in kinds:
        return False
    if isinstance(value, str):
        return len(value) <= schema["maxLength"]
    if isinstance(value, dict):
        known = schema["properties"]
        return (
            value.keys() <= known.keys()
            and value.keys() >= set(schema["required"])
            and all(fits(one, known[name]) for name, one in value.items())
        )
    if isinstance(value, list):
        enough = schema["minItems"] <= len(value) <= schema["maxItems"]
        return enough and all(fits(one, schema["items"]) for one in value)
    return (
        value is None or isinstance(value, bool) or schema["minimum"] <= value <= schema["maximum"]
    )


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer"}
    return names.get(type(value), "null" if value is None else "number")


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)
