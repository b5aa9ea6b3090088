# SPDX-License-Identifier: MIT
"""`PythonValue`: one Python literal as it comes, to JSON text. Knows no calls and no formats.

Strings (prefixes, triple quotes, escapes, neighbours that join), numbers, True, False, None (and
JSON's own words), lists, tuples (any parentheses), dicts. Names, sets, operators are no literals.
"""

import math
import re
from collections.abc import Callable

from tokenspeed.text.parsers.json_text import MAX_DEPTH, quoted

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[^\s,:=()\[\]{}\"'#]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_BASED = re.compile(r"[+-]?0(x[0-9a-f]+|o[0-7]+|b[01]+)", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-fA-F]+")
_OCTAL = re.compile(r"[0-7]{1,3}")
_STOPS = {mark: re.compile(rf"[\\{mark}]") for mark in "\"'"}
_CLOSER = {"[": "]", "(": ")", "{": "}"}
_WORDS = {"True": "true", "False": "false", "None": "null"}
_WORDS |= {word: word for word in _WORDS.values()}
_PREFIXES = {"r", "u", "b", "br", "rb"}
_ESCAPES = dict(zip("\\'\"abfnrtv", "\\'\"\a\b\f\n\r\t\v", strict=True)) | {"\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_LONGEST_NUMBER = 400


def json_number(word: str) -> str | None:
    """A Python number as JSON has it, None if it is none that JSON has."""
    if len(word) > _LONGEST_NUMBER:
        return None
    plain = word.replace("_", "").removeprefix("+")
    if _NUMBER.fullmatch(plain):
        return plain
    if _BASED.fullmatch(plain):
        return str(int(plain, 0))
    try:
        value = float(plain)
    except ValueError:
        return None
    return repr(value) if math.isfinite(value) else None


class PythonValue:
    """Push text until `done` (the value is over) or `broken` (it is no literal; `rest` is what was
    read and fits none).

    Work and memory are linear in the text: what has been looked at is consumed, but for at most
    ten characters of an escape or of quotes that need their neighbours.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self.rest = ""
        self._step: Callable[[str, int], int] = self._value
        self._out: list[str] = []
        self._hungry = False  # the step needs text that has not come
        self._stack: list[str] = []  # what closes the containers that are open, innermost last
        self._first = True  # the innermost container has no element yet
        self._may_close = False
        self._key = False  # the next value, or the last one, is a dict's key
        self._quote = ""
        self._raw = False
        self._word: list[str] = []

    def push(self, text: str, at: int) -> tuple[str, int]:
        """JSON text that became certain, and where in `text` the rest begins."""
        self._out, self._hungry = [], False
        while not (self.done or self.broken or self._hungry):
            at = self._step(text, at)
        return "".join(self._out), at

    def _skip(self, text: str, at: int) -> int:
        match = _SPACE.match(text, at)
        at = match.end() if match else at
        self._hungry = at == len(text)
        return at

    def _separate(self) -> None:
        if self._stack and not self._first and (self._key or self._stack[-1] != "}"):
            self._out.append(", ")
        self._first = False

    def _value(self, text: str, at: int) -> int:
        at = self._skip(text, at)
        if self._hungry:
            return at
        mark = text[at]
        if self._may_close and mark == self._stack[-1]:
            return self._close(at)
        if mark in "\"'":
            self._separate()
            self._out.append('"')
            self._raw = False
            self._step = self._open_quote
            return at
        if mark not in _CLOSER:
            self._step = self._in_word
            return at
        if self._key or len(self._stack) == MAX_DEPTH:
            self.broken = True
            return at
        self._separate()
        self._out.append("{" if mark == "{" else "[")
        self._stack.append(_CLOSER[mark])
        self._first = self._may_close = True
        self._key = mark == "{"
        return at + 1

    def _close(self, at: int) -> int:
        self._out.append("}" if self._stack.pop() == "}" else "]")
        self._first = self._key = False
        self._step = self._after
        return at + 1

    def _after(self, text: str, at: int) -> int:
        if not self._stack:
            self.done = True
            return at
        at = self._skip(text, at)
        if self._hungry:
            return at
        mark, closer = text[at], self._stack[-1]
        if self._key:
            self.broken = mark != ":"
            self._out.append("" if self.broken else ": ")
            self._key = self._may_close = False
        elif mark == closer:
            return self._close(at)
        else:
            self.broken = mark != ","
            self._may_close, self._key = True, closer == "}"
        self._step = self._value
        return at if self.broken else at + 1

    def _in_word(self, text: str, at: int) -> int:
        match = _WORD.match(text, at)
        end = match.end() if match else at
        self._word.append(text[at:end])
        if end == len(text):
            self._hungry = True
            return end
        word = "".join(self._word)
        self._word = []
        if text[end] in "\"'" and word.lower() in _PREFIXES:
            self._separate()
            self._out.append('"')
            self._raw = "r" in word.lower()
            self._step = self._open_quote
            return end
        value = _WORDS.get(word) or json_number(word)
        if value is None:
            self.broken, self.rest = True, word
            return end
        self._separate()
        self._out.append(f'"{value}"' if self._key else value)
        self._step = self._after
        return end

    def _open_quote(self, text: str, at: int) -> int:
        mark, there = text[at], text[at : at + 3]
        if len(there) < 3 and there == mark * len(there):
            self._hungry = True
            return at
        self._quote = mark * 3 if there == mark * 3 else mark
        self._step = self._in_string
        return at + len(self._quote)

    def _in_string(self, text: str, at: int) -> int:
        mark = self._quote[0]
        found = _STOPS[mark].search(text, at)
        end = found.start() if found else len(text)
        self._out.append(quoted(text[at:end]))
        if end == len(text):
            self._hungry = True
            return end
        if text[end] == "\\":
            return self._escape(text, end)
        there = text[end : end + len(self._quote)]
        if there == self._quote:
            self._step = self._after_string
            return end + len(there)
        if there == mark * len(there) and end + len(there) == len(text):
            self._hungry = True
            return end
        self._out.append(quoted(mark))
        return end + 1

    def _after_string(self, text: str, at: int) -> int:
        at = self._skip(text, at)
        if self._hungry:
            return at
        if text[at] in "\"'":
            self._raw = False
            self._step = self._open_quote
        else:
            self._out.append('"')
            self._step = self._after
        return at

    def _escape(self, text: str, at: int) -> int:
        """At a backslash: what it and the next characters mean. Unknown ones stay as they are."""
        letter = text[at + 1 : at + 2]
        digits = _HEX_DIGITS.get(letter, 0)
        need = 2 + digits if digits else 4 if letter in tuple("01234567") else 2
        if len(text) - at < (2 if self._raw else need):
            self._hungry = True
            return at
        if self._raw:
            self._out.append(quoted(text[at : at + 2]))
            return at + 2
        if letter in _ESCAPES:
            self._out.append(quoted(_ESCAPES[letter]))
            return at + 2
        octal = _OCTAL.match(text, at + 1)
        if octal:
            self._out.append(quoted(chr(int(octal[0], 8))))
            return octal.end()
        code = text[at + 2 : at + 2 + digits]
        if not digits or not _HEX.fullmatch(code) or int(code, 16) > 0x10FFFF:
            self._out.append("\\\\")
            return at + 1
        value = int(code, 16)
        half = 0xD800 <= value < 0xE000  # of a pair: JSON writes it so, too
        self._out.append(f"\\u{value:04x}" if half else quoted(chr(value)))
        return at + 2 + digits
