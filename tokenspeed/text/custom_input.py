# SPDX-License-Identifier: MIT
"""`InputText`: the text of a custom tool's `input` out of its arguments' JSON, as it streams.

Models write every call as JSON; a custom tool's client wants the text. Knows no format, no dialect.
"""

import re

_OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_MAX_OPENING = 256  # characters in which the opening must stand
_RUN = re.compile(r'[^"\\]+')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class InputText:
    """Push parts of the JSON, get parts of the text. What is not `{"input": "..."}` comes as it is.

    Lone surrogates become U+FFFD.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._state = "opening"  # "text", "over", "raw"
        self._high: int | None = None  # the first half of a surrogate pair

    def push(self, part: str) -> str:
        """Text that became certain."""
        if self._state == "over":
            return ""
        if self._state == "raw":
            return part
        self._rest += part
        if self._state == "opening":
            found = _OPENING.match(self._rest)
            if found is None:
                return self._flush() if len(self._rest) > _MAX_OPENING else ""
            self._state, self._rest = "text", self._rest[found.end() :]
        return self._decode()

    def finish(self) -> str:
        """The rest of arguments that ended."""
        if self._state == "opening":
            return self._flush()
        return self._unpaired()

    def _flush(self) -> str:
        self._state = "raw"
        rest, self._rest = self._rest, ""
        return rest

    def _decode(self) -> str:
        made: list[str] = []
        at, rest = 0, self._rest
        while at < len(rest):
            if run := _RUN.match(rest, at):
                made += (self._unpaired(), run.group())
                at = run.end()
            elif rest[at] == '"':
                made.append(self._unpaired())
                self._state, at = "over", len(rest)
            else:
                size = 6 if rest[at + 1 : at + 2] == "u" else 2
                if at + size > len(rest):
                    break
                made.append(self._escape(rest[at + 1 : at + size]))
                at += size
        self._rest = rest[at:]
        return "".join(made)

    def _escape(self, body: str) -> str:
        if body[0] != "u":
            return self._unpaired() + _ESCAPES.get(body[0], body[0])
        try:
            code = int(body[1:], 16)
        except ValueError:
            return self._unpaired() + "\\" + body
        if 0xDC00 <= code < 0xE000 and self._high is not None:
            high, self._high = self._high, None
            return chr(0x10000 + (high - 0xD800) * 0x400 + code - 0xDC00)
        before = self._unpaired()
        if 0xD800 <= code < 0xDC00:
            self._high = code
            return before
        return before + (chr(code) if not 0xDC00 <= code < 0xE000 else "\ufffd")

    def _unpaired(self) -> str:
        lone, self._high = self._high, None
        return "" if lone is None else "\ufffd"


def input_text(arguments: str) -> str:
    """The text of whole arguments."""
    reader = InputText()
    return reader.push(arguments) + reader.finish()
