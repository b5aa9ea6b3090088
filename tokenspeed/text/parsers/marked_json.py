# SPDX-License-Identifier: MIT
"""`MarkedJsonParser`: calls whose arguments are a JSON object between two markers.

What Kimi's, DeepSeek's and OpenAI's formats share: they differ in how a call is headed, and a
subclass reads that. The call ends where its object does; a marker in one of its strings is text.
"""

from tokenspeed.text.channels import Inputs
from tokenspeed.text.parsers.json_text import JsonText
from tokenspeed.text.parsers.thinking import ThinkParser


class MarkedJsonParser(ThinkParser):
    """A subclass gives `read_head`, which leads to `begin_arguments`, and keeps in `raw` what it
    reads.

    A section begins with the first of `openers` and a call with the last. `ends` are the markers
    that end a call's arguments, the first one the call's own. Once there was a call, `closers` are
    dropped wherever they stand, and `fences` after an object.
    """

    ends: tuple[str, ...] = ()
    fences: tuple[str, ...] = ()

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._opened = False
        self._name = ""
        self._id: str | None = None
        self._json = JsonText()

    def _calls(self) -> tuple[str, ...]:
        return (*self.openers, *self.closers) if self._opened else self.openers

    def opened(self, marker: str) -> None:
        self.state = self.read_head if marker == self.openers[-1] else self._read_section

    def _read_section(self) -> bool:
        self.raw.append(self.scan.skip_space())
        found = self.scan.expect(self.openers[-1])
        if found == "":
            return self.give_up()
        if found is not None:
            self.raw.append(found)
            self.state = self.read_head
        return found is not None

    def read_head(self) -> bool:
        """What stands between a call's opener and its arguments. Unused where `opened` reads it."""
        raise RuntimeError("a call was opened, whose head nobody reads")

    def begin_arguments(self, name: str, call_id: str | None, text: str = "") -> bool:
        """The head was read, and `text` of what follows it. What has no name is no call."""
        if not name or any(char.isspace() for char in name):
            return self._give_back(text)
        self._opened = True
        self._name, self._id, self._json = name, call_id, JsonText()
        self.state = self._read_arguments
        return self._feed(text)

    def _read_arguments(self) -> bool:
        text, marker = self.scan.take(*self.ends, keep=True)
        if text:
            return self._feed(text)
        if marker is None:
            return False
        json = self._json
        if not json.first:
            return self._feed("{}")  # no arguments
        if not json.broken and json.feed(marker)[0]:  # in a string
            self.out.arguments(self.scan.expect(marker) or "")
            return True
        self.close_call(complete=False, unclosed=True)
        self.state = self._read_rest
        return True

    def _feed(self, text: str) -> bool:
        """Reads arguments that stand before where `scan` is. From where they are no JSON they are
        given out as they are."""
        json = self._json
        if json.broken:
            self.out.arguments(text)
            return True
        end, part = json.feed(text)
        if not self.out.in_call:
            if json.first not in ("{", ""):
                return self._give_back(text)
            if not json.first:
                self.raw.append(text)
                return True
            self.out.start(self._name, self._id)
            part = part.lstrip()
        self.out.arguments(part)
        if not json.done:
            self.out.arguments(text[end:])
        else:
            self.scan.seek(self.scan.view()[1] - len(text) + end)
            self.close_call(unclosed=True)
            self.state = self._read_rest
        return True

    def _give_back(self, text: str) -> bool:
        """No call: `text`, which was read last, is to be read again but for the space before it."""
        body = text.lstrip(" \t\r\n")
        self.raw.append(text[: len(text) - len(body)])
        self.scan.seek(self.scan.view()[1] - len(body))
        return self.give_up()

    def _read_rest(self) -> bool:
        """What may stand between an object's end and the call's."""
        self.out.text(self.scan.skip_space())
        found = self.scan.expect(self.ends[0], *self.fences)
        if found == "":
            self.scan.cut(*self.ends, *self.fences)
        if found is not None and found not in self.fences:
            self.state = self.read_text
        return found is not None
