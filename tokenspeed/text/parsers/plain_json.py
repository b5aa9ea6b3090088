# SPDX-License-Identifier: MIT
"""`json`: calls as plain JSON, for models that no other format is known of.

    {"name": .., "arguments": {..}}    [{..}, {..}]    ```json {..} ```

An object or an array of them where content begins, or in a fence anywhere in it, is a call if it
names a tool of the request and has no members but a call's. All else is content.
"""

import re

from tokenspeed.text.channels import Format, Inputs
from tokenspeed.text.parsers.bare import BareParser
from tokenspeed.text.parsers.blocks import Blocks
from tokenspeed.text.parsers.json_call import JsonCall
from tokenspeed.text.parsers.json_text import quoted
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

FENCE, END_FENCE = "```json", "```"
_ARGUMENTS = ("arguments", "parameters")
_MEMBERS = ("name", *_ARGUMENTS, "type", "id")
_TOOLS = re.compile(r"\btools\b")


def quote(text: str) -> str:
    return f'"{quoted(text)}"'


class KnownCall(JsonCall):
    """A call only if it is to one of `names`. It starts when its arguments do, or at its end."""

    def __init__(self, out: Blocks, names: frozenset[str]) -> None:
        super().__init__(out)
        self._names = names
        self._name = ""
        self._keys = frozenset(map(quote, _MEMBERS))
        self._quoted = frozenset(map(quote, names))

    def _between(self, text: str, at: int) -> int:
        if self._last == ":" and self._key in _ARGUMENTS and self._name:
            self._start()
        return super()._between(text, at)

    def _within(self, text: str, at: int) -> int:
        """Character by character, so that what is no call's is text from there on."""
        if self._out.in_call or self._key not in (None, "name"):
            return super()._within(text, at)
        wanted = self._keys if self._key is None else self._quoted
        super()._within(text[at], 0)
        read = "".join(self._parts)
        self.broken |= not any(word.startswith(read) for word in wanted)
        return at + 1

    def _named(self, name: str) -> None:
        self._name = name
        self.broken = name not in self._names
        if self._seen and not self.broken:
            self._start()

    def _start(self) -> None:
        if not self._out.in_call:
            super()._named(self._name)

    def _end(self) -> None:
        if self._name:
            self._start()
        super()._end()


class PlainJsonParser(BareParser):
    openers: tuple[str, ...] = (FENCE,)

    starts = "{["

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._call = self._new_call()
        self._array = self._fenced = False

    def begins(self) -> None:
        self._array = self._fenced = False
        self.state = self._read_start

    def opened(self, marker: str) -> None:
        self._array, self._fenced = False, marker == FENCE
        self.state = self._read_start

    def cut(self) -> None:
        self._call.flush()
        if self.out.in_call:
            self.close_call(self._call.complete)
        else:
            super().cut()

    def _calls(self) -> tuple[str, ...]:
        return super()._calls() if self.known and self.out.channel == "content" else ()

    def _new_call(self) -> JsonCall:
        return KnownCall(self.out, self.known)

    def _read_start(self) -> bool:
        """Where a call or an array of calls may begin."""
        self.raw.append(self.scan.skip_space())
        char = self.scan.peek()
        if char == "{":
            self._call = self._new_call()
            self.state = self._read_call
        elif char == "[" and not self._array:
            self._array = True
            self.raw.append(char)
            self.skip(char)
        elif char:
            return self.give_up()
        return bool(char)

    def _read_call(self) -> bool:
        text, at = self.scan.view()
        end = self._call.feed(text, at)
        self.scan.seek(end)
        if not self.out.in_call:
            self.raw.append(text[at:end])
        if not self._call.done and not self._call.broken:
            return False
        if not self.out.in_call:
            return self.give_up()
        self._call.flush()
        self.close_call(self._call.complete, self._unclosed)
        if self._call.done:
            self.state = self._read_rest
        return True

    def _read_rest(self) -> bool:
        """What may stand after a call's object."""
        self.out.text(self.scan.skip_space())
        char = self.scan.peek()
        if char in ("," if self._array else ";") and char:
            self.raw = [char]
            self.skip(char)
            self.state = self._read_start
        elif char == "]" and self._array:
            self._array = False
            self.skip(char)
        elif char == "`" and self._fenced:
            found = self.scan.expect(END_FENCE)
            self._fenced = found is None
            return found is not None
        elif char:
            self.state = self.read_text
        return bool(char)


def _speaks(source: str) -> bool:
    return _TOOLS.search(source) is not None and any(word in source for word in _ARGUMENTS)


PLAIN_JSON = Format("json", (THINK, END_THINK, FENCE), PlainJsonParser, _speaks, think_starts_in)
