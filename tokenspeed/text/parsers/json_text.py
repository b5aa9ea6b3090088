# SPDX-License-Identifier: MIT
"""`JsonText`: where one JSON value ends in text that arrives in pieces. Knows no meaning of it.

A strict reader of RFC 8259 without recursion, with one favour: a control character in a string,
such as the line break that models forget to escape, is given out escaped.
"""

import json
import re

MAX_DEPTH = 256
_MAX_SCALAR = 1024  # characters of a number: Python and others refuse to read very long ones

_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_PART = re.compile(r"[A-Za-z0-9+\-.]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_encode = json.JSONEncoder(ensure_ascii=False).encode
_CLOSES = {"{": "}", "[": "]"}

# What may come next.
_VALUE, _FIRST_VALUE, _KEY, _FIRST_KEY, _COLON, _NEXT, _STRING, _NUMBER, _END = range(9)


def quoted(text: str) -> str:
    """`text` as a JSON string without its quotes."""
    return _encode(text)[1:-1]


class JsonText:
    """One value. `done`: it ended; `broken`: the text is no JSON from here on.

    `first` is the value's first character, which tells its type, once it was read.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self.first = ""
        self._next = _VALUE
        self._open: list[str] = []  # of brackets and braces: what closes them
        self._is_key = False
        self._escape = 0  # characters of an escape that are still to come; 5: the one after "\"
        self._scalar = ""

    def feed(self, text: str, at: int = 0) -> tuple[int, str]:
        """Reads `text[at:]`. Returns the index after the last character that is the value's, and
        what was read, fit to be given out. Leading white space is read, trailing is not."""
        parts: list[str] = []
        end = len(text)
        while at < end and not self.done and not self.broken:
            start = at
            if self._next == _STRING:
                at, control = self._string(text, at)
                parts.append(text[start:at])
                if control:
                    parts.append(quoted(control))
                    at += 1
                continue
            at = self._number(text, at) if self._next == _NUMBER else self._structure(text, at)
            parts.append(text[start:at])
        return at, "".join(parts)

    def finish(self) -> None:
        """The text is over: a number that stands alone is done by that."""
        if self._next == _NUMBER and not self.done and not self.broken:
            self._end_number()
        self.broken = not self.done

    def _string(self, text: str, at: int) -> tuple[int, str]:
        """Reads on in a string; stops before a control character and returns it."""
        while at < len(text):
            if self._escape:
                at = self._escaped(text, at)
                if self.broken:
                    break
                continue
            found = _PLAIN.match(text, at)
            at = found.end() if found else at
            char = text[at : at + 1]
            if char == '"':
                self._next = _COLON if self._is_key else _NEXT
                self._close_value()
                return at + 1, ""
            if char == "\\":
                self._escape = 5
                at += 1
            elif char:
                return at, char
        return at, ""

    def _escaped(self, text: str, at: int) -> int:
        char = text[at]
        if self._escape == 5:
            self._escape = 4 if char == "u" else 0
            self.broken = char not in '"\\/bfnrtu'
        else:
            self._escape -= 1
            self.broken = char not in "0123456789abcdefABCDEF"
        return at if self.broken else at + 1

    def _number(self, text: str, at: int) -> int:
        """Reads on in a number, true, false or null."""
        room = _MAX_SCALAR - len(self._scalar)
        found = _SCALAR_PART.match(text, at, at + room)
        stop = found.end() if found else at
        self._scalar += text[at:stop]
        if stop < len(text):
            self._end_number()
        return stop

    def _end_number(self) -> None:
        self.broken = not _SCALAR.fullmatch(self._scalar) or len(self._scalar) >= _MAX_SCALAR
        self._next, self._scalar = _NEXT, ""
        if not self.broken:
            self._close_value()

    def _structure(self, text: str, at: int) -> int:
        """Reads white space and one character that is in no string and no number."""
        found = _SPACE.match(text, at)
        at = found.end() if found else at
        char = text[at : at + 1]
        if not char:
            return at
        state = self._next
        self.first = self.first or char
        if state in (_NEXT, _FIRST_VALUE, _FIRST_KEY) and char == (self._open or " ")[-1]:
            self._open.pop()
            self._next = _NEXT
            self._close_value()
        elif state == _NEXT and char == ",":
            self._next = _KEY if self._open[-1] == "}" else _VALUE
        elif state == _COLON and char == ":":
            self._next = _VALUE
        elif state in (_KEY, _FIRST_KEY) and char == '"':
            self._next, self._is_key = _STRING, True
        elif state in (_VALUE, _FIRST_VALUE) and self._begins(char):
            return at if self._next == _NUMBER else at + 1
        else:
            self.broken = True
            return at
        return at + 1

    def _begins(self, char: str) -> bool:
        """Begins a value with its first character, if it is one."""
        if char in _CLOSES and len(self._open) < MAX_DEPTH:
            self._open.append(_CLOSES[char])
            self._next = _FIRST_KEY if char == "{" else _FIRST_VALUE
        elif char == '"':
            self._next, self._is_key = _STRING, False
        elif char in "-0123456789tfn":
            self._next = _NUMBER
        else:
            return False
        return True

    def _close_value(self) -> None:
        if not self._open:
            self.done, self._next = True, _END


def as_json(text: str, first: str = "") -> str | None:
    """`text` if it is one JSON value that begins with one of the characters `first`, else None."""
    value = JsonText()
    end, whole = value.feed(text)
    value.finish()
    fits = value.done and not text[end:].strip(" \t\r\n") and (not first or value.first in first)
    return whole if fits else None
