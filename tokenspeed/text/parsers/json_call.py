# SPDX-License-Identifier: MIT
"""`JsonCall`: reads `{"name": ..., "arguments": {...}}` and writes the call. Knows no tags.

The arguments stream if the name came first; otherwise they wait for it. Arguments that are a string
of JSON are unpacked; none at all, or null, are `{}`. Other members are read over.
"""

import json

from tokenspeed.text.parsers.blocks import Blocks
from tokenspeed.text.parsers.json_text import JsonText, as_json

_NAME, _ARGUMENTS = "name", ("arguments", "parameters")
_SPACE = " \t\r\n"
# What may stand next between keys and values.
_AFTER = {"": "{", "{": '"}', "key": ":", "value": ",}", ",": '"'}


class JsonCall:
    """`done`: the object ended, and is a call; `broken`: it is none, or none from here on.

    `complete`: the arguments are whole, be the object itself done or not. The call is started in
    `out` once its name is known; to end it is left to the caller.
    """

    def __init__(self, out: Blocks, call_id: str | None = None) -> None:
        self.done = False
        self.broken = False
        self.complete = False
        self._out = out
        self._id = call_id
        self._last = ""  # what was read last between keys and values
        self._value: JsonText | None = None
        self._key: str | None = None
        self._parts: list[str] = []  # of a key, a name, or arguments that wait
        self._held = ""  # whole arguments that wait for the name
        self._seen = False  # the arguments were read
        self._streams = False

    def feed(self, text: str, at: int = 0) -> int:
        """Reads `text[at:]`; returns the index after the last character that belongs to it."""
        while at < len(text) and not self.done and not self.broken:
            at = self._between(text, at) if self._value is None else self._within(text, at)
        return at

    def flush(self) -> None:
        """The object is cut or broken: gives out arguments that wait, if the call has begun."""
        waiting = self._value is not None and self._key in _ARGUMENTS and not self._seen
        if self._out.in_call and waiting:
            self._out.arguments("".join(self._parts))
            self._parts = []

    def _between(self, text: str, at: int) -> int:
        char = text[at]
        if char in _SPACE:
            return at + 1
        if self._last == ":":
            self._value = JsonText()
            self._streams = self._key in _ARGUMENTS and char == "{" and not self._seen
            return at
        if char not in _AFTER[self._last]:
            self.broken = True
            return at
        if char == '"':
            self._value, self._key, self._streams = JsonText(), None, False
            return at
        self._last = char
        if char == "}":
            self._end()
        return at + 1

    def _within(self, text: str, at: int) -> int:
        value = self._value
        if value is None:
            return at
        at, part = value.feed(text, at)
        if self._streams and self._out.in_call:
            self._out.arguments(part)
        elif self._key is None or self._key == _NAME or self._key in _ARGUMENTS:
            self._parts.append(part)
        self.broken = value.broken
        if value.done:
            self._value = None
            self._ended()
        return at

    def _ended(self) -> None:
        """A key or a value has ended."""
        whole, self._parts = "".join(self._parts), []
        if self._key is None:
            self._key, self._last = json.loads(whole), "key"
            return
        self._last = "value"
        if self._key == _NAME and not self._out.in_call:
            self._named(json.loads(whole) if whole.startswith('"') else "")
        elif self._key in _ARGUMENTS and not self._seen:
            self._argued(whole)

    def _named(self, name: str) -> None:
        if not name:
            self.broken = True
            return
        self._out.start(name, self._id)
        self._out.arguments(self._held)

    def _argued(self, whole: str) -> None:
        self._seen = self.complete = True
        if not self._streams:
            inner = json.loads(whole) if whole.startswith('"') else ""
            if whole == "null" or (whole.startswith('"') and not inner.strip()):
                whole = "{}"
            else:
                unpacked = as_json(inner, "{")
                self.complete = unpacked is not None
                whole = unpacked or whole
        if self._out.in_call:
            self._out.arguments(whole)  # but for what has streamed
        else:
            self._held = whole

    def _end(self) -> None:
        self.done = self._out.in_call
        self.broken = not self.done
        if self.done and not self._seen:
            self._out.arguments("{}")
            self.complete = True
