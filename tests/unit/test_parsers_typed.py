# SPDX-License-Identifier: MIT
"""Raw text of parameters to JSON, by schemas of every kind, the broken ones too."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.text.conversation import Tool
from tokenspeed.text.parsers.schema_kinds import KINDS, kinds_of
from tokenspeed.text.parsers.typed import TypedValue


def tool(parameters: Any) -> Tool:
    return Tool("f", parameters=parameters)


def kinds(schema: Any, **root: Any) -> frozenset[str]:
    parameters = {"type": "object", "properties": {"a": schema}, **root}
    return kinds_of([tool(parameters)], "f", "a")


def typed(schema: Any, *parts: str) -> str:
    value = TypedValue(kinds(schema))
    return "".join([value.feed(part) for part in parts]) + value.finish()


STRING, NULL = {"type": "string"}, {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "text", "json_text"),
    [
        (STRING, "5", '"5"'),
        (STRING, "null", '"null"'),
        (STRING, "", '""'),
        (STRING, ' a "b"\n\\', '" a \\"b\\"\\n\\\\"'),
        ({"type": "integer"}, " 5 ", "5"),
        ({"type": "integer"}, "5.0", "5"),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "integer"}, "five", '"five"'),
        ({"type": "integer"}, "007", '"007"'),
        ({"type": "number"}, "-2e-7", "-2e-7"),
        ({"type": "number"}, "NaN", '"NaN"'),
        ({"type": "boolean"}, "True", "true"),
        ({"type": "boolean"}, "yes", '"yes"'),
        ({"type": "null"}, "None", "null"),
        ({"type": "object"}, '\n{"a": [1]}\n', '{"a": [1]}'),
        ({"type": "object"}, "{'a': [True, None]}", '{"a": [true, null]}'),
        ({"type": "object"}, "{'a'", "\"{'a'\""),
        ({"type": "array"}, '["x\ny"]', '["x\\ny"]'),
        ({"type": "array"}, "1, 2", '"1, 2"'),
        ({"type": "integer"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": ["string", "null"]}, "nullable", '"nullable"'),
        ({"type": ["string", "integer"]}, "12", "12"),
        ({"type": ["string", "integer"]}, "12 apples", '"12 apples"'),
        ({"anyOf": [STRING, {"type": "array"}]}, '["a"]', '["a"]'),
        ({"anyOf": [STRING, {"type": "array"}]}, "[a", '"[a"'),
        ({"oneOf": [{"type": "integer"}, NULL]}, "3", "3"),
        ({"type": "integer", "nullable": True}, "null", "null"),
        ({"enum": ["1", "2"]}, "1", '"1"'),
        ({"enum": [1, "auto"]}, "1", "1"),
        ({"enum": [1, "auto"]}, "auto", '"auto"'),
        ({"const": True}, "true", "true"),
        ({"allOf": [STRING, {"maxLength": 3}]}, "5", '"5"'),
        ({"items": STRING}, "[]", "[]"),
        ({"type": "float"}, "2", "2"),
        ({}, "5", "5"),
        ({}, "x", '"x"'),
        ({}, '{"a": 1}', '{"a": 1}'),
        ({}, "{not json", '"{not json"'),
        (True, "false", "false"),
    ],
)
def test_values(schema: Any, text: str, json_text: str) -> None:
    assert typed(schema, text) == json_text
    assert typed(schema, *text) == json_text
    json.loads(json_text)


def test_strings_stream() -> None:
    value = TypedValue(frozenset({"string"}))
    assert [value.feed(part) for part in ("a", '"', "\n")] == ['"a', '\\"', "\\n"]
    union = TypedValue(kinds({"type": ["string", "null"]}))
    assert [union.feed(part) for part in ("n", "u", "mber")] == ["", "", '"number']


@given(st.sets(st.sampled_from(sorted(KINDS)), min_size=1), st.text(), st.integers(1, 9))
def test_any_text_however_cut(allowed: set[str], text: str, size: int) -> None:
    whole, parts = TypedValue(frozenset(allowed)), TypedValue(frozenset(allowed))
    expected = whole.feed(text) + whole.finish()
    made = [parts.feed(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(made) + parts.finish() == expected
    json.loads(expected)


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    return schema


def test_references() -> None:
    defs = {"Id": {"type": "integer"}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, STRING]}}
    assert kinds({"$ref": "#/$defs/Id"}, **{"$defs": defs}) == {"integer"}
    assert kinds({"$ref": "#/$defs/Loop"}, **{"$defs": defs}) == {"string"}
    assert kinds({"$ref": "#/properties/a"}) == KINDS
    assert kinds({"$ref": "#/$defs/none"}) == KINDS
    assert kinds({"$ref": "https://example.org/x"}) == KINDS
    parameters = {"$ref": "#/$defs/P", "$defs": {"P": {"properties": {"a": STRING}}}}
    assert kinds_of([tool(parameters)], "f", "a") == {"string"}


@pytest.mark.parametrize(
    "schema",
    [None, 5, "x", [], {"type": 5}, {"type": [5, None]}, {"type": "what"}, {"anyOf": 5},
     {"anyOf": []}, {"anyOf": [5, None]}, {"$ref": 5}, {"$ref": "#/~2/%"}, {"enum": {}},
     {"enum": []}, {"allOf": "x"}, nested(5000)],
)  # fmt: skip
def test_malformed_schemas_allow_everything(schema: Any) -> None:
    assert kinds(schema) == KINDS


def test_malformed_tools() -> None:
    loop: dict[str, Any] = {}
    loop["allOf"] = [loop, {"$ref": "#"}]
    for parameters in (loop, {"properties": []}, {"properties": {"b": STRING}}, {"anyOf": [[]]}):
        assert kinds_of([tool(parameters)], "f", "a") == KINDS
    assert kinds_of([], "f", "a") == KINDS
    assert kinds_of([Tool("f", custom=True)], "f", "input") == {"string"}
