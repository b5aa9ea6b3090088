# SPDX-License-Identifier: MIT
"""Markers and JSON in pieces of text, against readers of the whole text."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Piece,
    joined,
)
from tokenspeed.text.parsers.blocks import Blocks
from tokenspeed.text.parsers.json_call import JsonCall
from tokenspeed.text.parsers.json_text import MAX_DEPTH, JsonText, as_json
from tokenspeed.text.parsers.scanner import Scanner

MARKERS = st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


def scanned(markers: list[str], pieces: list[Piece], tokens: frozenset[str]) -> list[Any]:
    """Texts and markers in turn."""
    scanner, found, text = Scanner(tokens), [], ""
    for piece in [*pieces, None]:
        if piece is None:
            scanner.close()
        else:
            scanner.add(piece)
        marker: str | None = ""
        while marker is not None:
            part, marker = scanner.take(*markers)
            text += part
            if marker is not None:
                found += [text, marker]
                text = ""
    return [*found, text]


@given(st.text("ab<", max_size=16), MARKERS, st.integers(1, 5))
def test_leftmost_then_longest(text: str, markers: list[str], size: int) -> None:
    pattern = "|".join(map(re.escape, sorted(markers, key=len, reverse=True)))
    pieces = [Piece(text[i : i + size]) for i in range(0, len(text), size)]
    assert scanned(markers, pieces, frozenset()) == re.split(f"({pattern})", text)


def test_tokens_are_markers_only_as_tokens() -> None:
    tokens = frozenset({"<t>", "<u>"})
    pieces = [Piece("a<t>"), Piece("<t>", True), Piece("<u>", True), Piece("<x"), Piece(">", True)]
    assert scanned(["<t>", "<x>"], pieces, tokens) == ["a<t>", "<t>", "<u>", "<x>", ""]
    assert scanned(["<u><x>"], pieces, tokens) == ["a<t><t>", "<u><x>", ""]


def test_what_is_no_marker_is_not_held() -> None:
    scanner = Scanner(frozenset())
    scanner.add(Piece("abc </tool_x"))
    assert scanner.take("</tool_call>") == ("abc </tool_x", None)
    scanner.add(Piece(" </tool_c"))
    assert scanner.take("</tool_call>") == (" ", None)
    assert scanner.expect("</tool_call>") is None
    scanner.add(Piece("all>"))
    assert scanner.expect("</tool_call>") == "</tool_call>"
    assert scanner.empty


@given(JSON, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 7))
def test_json_ends_where_it_ends(value: Any, ascii_: bool, indent: int | None, size: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_, indent=indent)
    reader, given_out, at = JsonText(), "", 0
    more = text + " ]}x"
    while not reader.done:
        end, part = reader.feed(more[at : at + size])
        given_out, at = given_out + part, at + end
        assert not reader.broken
    assert (given_out, at) == (text, len(text))


@given(JSON, st.integers(0, 99), st.sampled_from('{}[],:"x1\\ tnu-.eE'))
def test_json_is_what_python_takes(value: Any, place: int, char: str) -> None:
    text = json.dumps(value)
    place %= len(text) + 1
    for changed in (text[:place] + char + text[place:], text[:place] + text[place + 1 :]):
        try:
            json.loads(changed, parse_constant=lambda _: 1 / 0)
            valid = True
        except (ValueError, ZeroDivisionError):
            valid = False
        assert (as_json(changed) is not None) == valid, changed


def test_json_repaired_and_refused() -> None:
    assert as_json('"a\nb\t"') == '"a\\nb\\t"'
    assert as_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    for bad in ("[" * 30_000, "{" * 5, "1" * 5000, "", " ", '"\\x"', '"\\u12g4"', "[1 2]", "nul"):
        assert as_json(bad) is None
    assert as_json("[1]", "{") is None


def called(text: str, size: int) -> tuple[list[Event], JsonCall]:
    out = Blocks("content")
    call = JsonCall(out)
    for i in range(0, len(text), size):
        call.feed(text[i : i + size])
    call.flush()
    return joined(out.take()), call


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_that_are_objects(size: int) -> None:
    events, call = called('{"id": [1], "name": "f", "parameters": {"a": "}"}, "x": {}}', size)
    assert events == [CallStart("f"), CallArguments('{"a": "}"}')]
    assert call.done
    assert call.complete
    events, call = called('{"arguments": {"a": 1}, "name": "f"}', size)
    assert events == [CallStart("f"), CallArguments('{"a": 1}')]
    assert called('{"arguments": {"a": 1}}', size)[1].broken
    assert called('{"name": ""}', size)[1].broken
    assert called('{"name": "f", "name": "g"}', size)[0] == [CallStart("f"), CallArguments("{}")]
    twice = '{"name": "f", "arguments": {}, "arguments": {"a": 1}}'
    assert called(twice, size)[0] == [CallStart("f"), CallArguments("{}")]


def test_events_of_blocks() -> None:
    out = Blocks("content")
    for part in ("\n", " a", " ", "\n", "b \n"):
        out.text(part)
    out.start("f")
    out.end()
    out.text("\n \n")
    out.start("g")
    out.finish()
    calls = [CallStart("f"), CallEnd(), CallStart("g"), CallEnd(complete=False)]
    assert joined(out.take()) == [Content("\n a \nb "), *calls]
