# SPDX-License-Identifier: MIT
"""Grammars as EBNF text, as xgrammar prints them: rewritten so that they hold inside other text.

Knows literals, classes of characters and that everything between them stays. Parses no rules.
"""

import json
import re
from collections.abc import Mapping

_PART = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[A-Za-z_][\w.-]*', re.DOTALL)
_CHAR = re.compile(
    r"\\x([0-9A-Fa-f]{1,2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|(.)", re.DOTALL
)
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
_LAST = 0x10FFFF
_MUST = (0x22, 0x5C)  # the quote and the backslash must be escaped, and so must all below a space
_GAP = r"[ \n\r\t]*"
_INDENTS = [" " * n for n in range(0, 42, 2)] + ["\\t" * n for n in range(1, 11)]
_SPACE = (
    'json_space ::= "" | " " | "\\n" json_indent\n'
    f"json_indent ::= {' | '.join(f'{chr(34)}{indent}{chr(34)}' for indent in _INDENTS)}\n"
)
_AFTER_TAG = re.compile(r'("(?:(?!</)(?:\\.|[^"\\]))*>") ' + re.escape(_GAP))
_BEFORE_END = re.compile(re.escape(_GAP) + r'(?= "</)')
_USUAL = ('"', "\\", "\n", "\r", "\t", "\b", "\f")  # what classes get an escape for


def in_json_string(grammar: str) -> str:
    """A grammar of the JSON texts of the strings that `grammar` matches, quotes around them.

    Control characters that JSON has no short escape for are left out of classes. `ValueError` for
    what cannot be rewritten.
    """
    if "TagDispatch" in grammar or "Token(" in grammar:
        raise ValueError("a grammar inside a JSON string has no tags and no tokens")

    def rewrite(part: re.Match[str]) -> str:
        text = part.group()
        if text[0] == "[":
            return _class(text[1:-1])
        if text[0] == '"':
            return literal(_escape(_unquote(text[1:-1])))
        return "json_string_text" if text == "root" else text

    return 'root ::= "\\"" json_string_text "\\""\n' + _PART.sub(rewrite, grammar)


def with_tokens(grammar: str, tokens: Mapping[str, int]) -> str:
    """The grammar with these markers, wherever they stand in a literal, as tokens."""
    marker = re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")

    def rewrite(part: re.Match[str]) -> str:
        text = part.group()
        if text[0] != '"' or grammar[: part.start()].endswith("excludes=("):
            return text
        pieces = [piece for piece in marker.split(_unquote(text[1:-1])) if piece]
        if not any(piece in tokens for piece in pieces):
            return text
        return " ".join(
            f"Token({tokens[piece]})" if piece in tokens else literal(piece) for piece in pieces
        )

    return _PART.sub(rewrite, grammar)


def with_little_space(grammar: str) -> str:
    """A grammar of JSON in which a gap is a space, or a line break and its indentation.

    Models that have nothing to say can otherwise fill gaps until their tokens are spent.
    """
    return "\n".join(map(_narrow_gaps, grammar.split("\n"))) + "\n" + _SPACE


def with_tight_values(grammar: str, *, padded: bool) -> str:
    """A grammar of values in tags without gaps around them, where space would be the value's.

    `padded`: a line break before and after it is not.
    """
    pad = '("" | "\\n")' if padded else ""
    grammar = _BEFORE_END.sub(lambda _: pad, grammar)
    return _AFTER_TAG.sub(lambda found: f"{found[1]} {pad}", grammar)


def _narrow_gaps(rule: str) -> str:
    """All but those in its lookahead, which only says what can follow at most."""
    body, mark, ahead = rule.partition(" (=(")
    return body.replace(_GAP, "json_space") + mark + ahead


def literal(text: str) -> str:
    """A literal that matches the text."""
    return '"' + "".join(map(_char, text)) + '"'


def _char(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if " " <= char <= "~":
        return char
    return f"\\U{ord(char):08x}" if ord(char) > 0xFFFF else f"\\u{ord(char):04x}"


def _unquote(body: str) -> str:
    return "".join(chr(code) for code, _ in _codes(body))


def _codes(body: str) -> list[tuple[int, bool]]:
    """Each character, and whether it was escaped."""
    found = []
    for match in _CHAR.finditer(body):
        two, four, eight, named, plain = match.groups()
        if number := two or four or eight:
            found.append((int(number, 16), True))
        elif named is not None:
            found.append((ord(_NAMED.get(named, named)), True))
        else:
            found.append((ord(plain), False))
    return found


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _class(body: str) -> str:
    """A class as a choice between its plain characters and the escapes of the others."""
    codes = _codes(body)
    negated = bool(codes) and codes[0] == (ord("^"), False)
    ranges = _ranges(codes[1:] if negated else codes)
    if negated:
        ranges = _complement(ranges)
    plain = _cut(ranges)
    choices = [f"[{''.join(map(_range, plain))}]"] if plain else []
    for char in _USUAL:
        if any(low <= ord(char) <= high for low, high in ranges):
            choices.append(literal(_escape(char)))
    if not choices:
        raise ValueError("a class of characters that JSON strings hardly hold")
    return "(" + " | ".join(choices) + ")"


def _ranges(codes: list[tuple[int, bool]]) -> list[tuple[int, int]]:
    found, at = [], 0
    while at < len(codes):
        low = codes[at][0]
        if at + 2 < len(codes) and codes[at + 1] == (ord("-"), False):
            found.append((low, codes[at + 2][0]))
            at += 3
        else:
            found.append((low, low))
            at += 1
    return sorted(found)


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found, start = [], 0
    for low, high in ranges:
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, _LAST)] if start <= _LAST else found


def _cut(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without what must be escaped, nor surrogates."""
    holes = [(0, 0x1F), *((code, code) for code in _MUST), (0xD800, 0xDFFF)]
    for hole_low, hole_high in holes:
        cut = []
        for low, high in ranges:
            if high < hole_low or low > hole_high:
                cut.append((low, high))
                continue
            if low < hole_low:
                cut.append((low, hole_low - 1))
            if high > hole_high:
                cut.append((hole_high + 1, high))
        ranges = cut
    return ranges


def _range(ends: tuple[int, int]) -> str:
    low, high = (f"\\U{code:08x}" for code in ends)
    return low if low == high else f"{low}-{high}"
