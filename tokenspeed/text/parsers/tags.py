# SPDX-License-Identifier: MIT
"""`TagParser`: calls whose name and parameters stand in tags of their own. Knows no family's tags.

A call is: opener, name, then parameters (opener, key, value, closer) and the closer, with white
space between. Values are raw text that may hold any tag. So a value's closing tag counts only if a
tag follows it that can follow a value; otherwise it is part of the value, as is the space after it.
"""

import re
from dataclasses import dataclass

from tokenspeed.text.channels import Inputs
from tokenspeed.text.parsers.json_text import quoted
from tokenspeed.text.parsers.schema_kinds import kinds_of
from tokenspeed.text.parsers.thinking import ThinkParser
from tokenspeed.text.parsers.typed import TypedValue

_NAME = re.compile(r"[^\s<>{}\"']{1,256}")
_NO_NAME = ("<", "\n")  # end the text of a name or key that is none


@dataclass(frozen=True, slots=True)
class Tags:
    """What a family writes. A section stands around calls; a family may have none (empty)."""

    section: tuple[str, str]
    call: tuple[str, str]
    name_end: str  # the last character of the call's opening tag
    parameter: str  # opener; the key follows
    key_end: str
    value: str  # opener, after the key's end; empty if there is none
    value_end: str
    padded: bool = False  # a line break before and after a value is not the value's


class TagParser(ThinkParser):
    """A subclass gives `tags`, and `openers`, `inner` and `closers` to go with them.

    An opener of `openers` begins a call whatever its name; a call of `inner` that stands in no
    section is one only if there is a tool of that name.
    """

    tags: Tags

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._names = {tool.name for tool in inputs.tools}
        self._name = ""
        self._any_name = True
        self._part: list[str] = []  # of a name or a key
        self._count = 0  # parameters so far
        self._value = TypedValue(frozenset())
        self._at_start = False  # of a value, before its line break
        self._tail = ""  # of a value, that may be its last line break
        self._closing: list[str] = []  # after a value, if it has ended

    def opened(self, marker: str) -> None:
        self._any_name = marker in self.openers or self._unclosed
        self._part = []
        self.state = self._find_call if marker == self.tags.section[0] else self._read_name

    def parameter(self, header: str) -> tuple[str, frozenset[str]]:
        """A parameter's key and the types it may have, by the text of its opening tag."""
        key = _bare(header)
        return key, kinds_of(self.inputs.tools, self._name, key)

    def _find_call(self) -> bool:
        """In a section: white space, then a call."""
        self.raw.append(self.scan.skip_space())
        marker = self.scan.expect(self.tags.call[0])
        if marker is None:
            return False
        self.raw.append(marker)
        self.state = self._read_name
        return bool(marker) or self.give_up()

    def _read_name(self) -> bool:
        if not self._part:
            self.raw.append(self.scan.skip_space())
        tags = self.tags
        text, marker = self.scan.take(
            tags.name_end, tags.parameter, tags.call[1], *_NO_NAME, keep=True
        )
        self._part += [text] if text else []
        self.raw.append(text)
        if marker is None:
            return False
        name = _bare("".join(self._part))
        if name not in self._names and not (self._any_name and _NAME.fullmatch(name)):
            return self.give_up()
        if marker in _NO_NAME and marker != tags.name_end:
            return self.give_up()
        if marker == tags.name_end:
            self.scan.expect(marker)
        self._name, self._count = name, 0
        self.out.start(name)
        self.state = self._between
        return True

    def _between(self) -> bool:
        """White space, then a parameter or the call's end."""
        self.scan.skip_space()
        tags = self.tags
        follows = (tags.parameter, tags.call[1], *self.closers)
        marker = self.scan.expect(*follows)
        if marker is None or (not marker and self.scan.cut(*follows)):
            return False
        if marker == tags.parameter:
            self._part = []
            self.state = self._read_key
            return True
        if not marker:
            return self._break("")
        self.out.arguments("}" if self._count else "{}")
        return self.close_call(unclosed=marker not in self.closers)

    def _read_key(self) -> bool:
        text, marker = self.scan.take(self.tags.key_end, *_NO_NAME, keep=True)
        self._part.append(text)
        if marker is None:
            return False
        if marker != self.tags.key_end:
            return self._break(self.tags.parameter)
        self.scan.expect(marker)
        self._part.append(marker)
        self.state = self._find_value
        return True

    def _find_value(self) -> bool:
        """After a key: the value's opening tag, if the family has one."""
        if self.tags.value:
            self._part.append(self.scan.skip_space())
            marker = self.scan.expect(self.tags.value)
            if marker is None:
                return False
            if not marker:
                return self._break(self.tags.parameter)
        header = "".join(self._part).partition(self.tags.key_end)[0]
        key, kinds = self.parameter(header)
        self.out.arguments((", " if self._count else "{") + f'"{quoted(key)}": ')
        self._count += 1
        self._value, self._at_start, self._tail = TypedValue(kinds), self.tags.padded, ""
        self.state = self._read_value
        return True

    def _read_value(self) -> bool:
        ends = (self.tags.value_end, self.tags.call[1]) if self.closers else (self.tags.value_end,)
        text, marker = self.scan.take(*ends)
        self._feed(text)
        if marker is None:
            return False
        self._closing = [marker]
        self.state = self._after_value
        return True

    def _after_value(self) -> bool:
        """A closing tag was read: that of the value, or that of the call if it lacks the other."""
        self._closing.append(self.scan.skip_space())
        whole_call = self._closing[0] != self.tags.value_end
        inner = () if whole_call else (self.tags.parameter, self.tags.call[1])
        follows = (*inner, *self.closers)
        at = self.scan.view()[1]
        marker = self.scan.expect(*follows)
        self.scan.seek(at)
        if marker is None:
            return False
        over = self.scan.closed and (self.scan.empty or self.scan.cut(*follows))
        if marker or over:
            self.out.arguments(self._value.finish())
            self.state = self._between
            if whole_call:
                self.out.arguments("}")
                self.close_call(unclosed=True)
            return True
        self._feed("".join(self._closing))
        self.state = self._read_value
        return True

    def _feed(self, text: str) -> None:
        """Gives text to the value, but for the line breaks around it."""
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix("\n")
        if self.tags.padded:
            text = self._tail + text
            self._tail = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        if text:
            self.out.arguments(self._value.feed(text))

    def _break(self, opener: str) -> bool:
        """What follows fits no call: it is text."""
        self.close_call(complete=False, unclosed=True)
        self.out.text(opener + "".join(self._part) if opener else "")
        return True


def _bare(text: str) -> str:
    """A name or key without the white space and quotes around it."""
    return text.strip().strip("\"'")
