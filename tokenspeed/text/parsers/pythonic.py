# SPDX-License-Identifier: MIT
"""`pythonic`: calls as a list of Python's, as Llama 3.2 and 4, LFM2 and ToolACE write them.

    [NAME(KEY="text", OTHER=[1, {"a": None}]), NAME()]

The list stands where content begins and names tools of the request, or behind a marker, where any
name is a call's. Arguments by position take the names of the tool's parameters in their order.
"""

import re

from tokenspeed.text.channels import Format, Inputs
from tokenspeed.text.parsers.bare import BareParser
from tokenspeed.text.parsers.json_text import quoted
from tokenspeed.text.parsers.python_text import PythonValue
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

_OPENERS = ("<|python_start|>", "<|tool_call_start|>")
_CLOSERS = ("<|python_end|>", "<|tool_call_end|>")
_NAME = re.compile(r"[A-Za-z0-9_.\-]{0,257}")
_WORD = re.compile(r"(?:[^\W\d]\w{0,256})?")
_LONGEST = 256
_SPOKEN = re.compile(r"name\s*[+~]\s*['\"]\(|<\|tool_list_start\|>")


class _PythonicParser(BareParser):
    starts = "["
    openers = _OPENERS
    closers = _CLOSERS

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._marked = False  # the list stands behind a marker
        self._listed = False  # a call of the list was read
        self._name = ""
        self._keys = 0  # arguments so far
        self._word = ""
        self._value = PythonValue()

    def begins(self) -> None:
        self._marked = False
        self.state = self._read_list

    def opened(self, marker: str) -> None:
        # The marker also stands before plain content: it is none of it.
        self.raw, self._marked, self._unclosed = [], True, True
        self.state = self._read_list

    def _space(self) -> str:
        """Reads white space; returns what stands next, or "" if that is not known yet."""
        space = self.scan.skip_space()
        if not self.out.in_call:
            self.raw.append(space)
        return self.scan.peek()

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        """What of `pattern` stands next, or None if that is not known yet."""
        text, at = self.scan.view()
        found = pattern.match(text, at)
        word = found[0] if found else ""
        return None if at + len(word) == len(text) and len(word) <= _LONGEST else word

    def _pass(self, text: str) -> None:
        self.skip(text)
        if not self.out.in_call:
            self.raw.append(text)

    def _read_list(self) -> bool:
        char = self._space()
        if char == "[":
            self._pass(char)
            self._listed = False
            self.state = self._read_name
        elif char:
            return self.give_up()
        return bool(char)

    def _read_name(self) -> bool:
        char = self._space()
        if char == "]" and self._listed:
            return self._end_list()
        name = self._match(_NAME)
        if name is None:
            return False
        self._pass(name)
        known = name in self.known or (self._marked and 0 < len(name) <= _LONGEST)
        if not known or self.scan.peek() != "(":
            return self.give_up()
        self._pass("(")
        self._name, self._keys = name, 0
        self.state = self._read_argument
        return True

    def _read_argument(self) -> bool:
        """After a bracket or a comma."""
        char = self._space()
        if char == ")":
            return self._end_call()
        word = self._match(_WORD)
        if not char or word is None:
            return False
        self._word = word
        self._pass(word)
        self.state = self._read_equals
        return True

    def _read_equals(self) -> bool:
        char = self._space()
        if not char:
            return False
        key, word = self._word, ""
        if char != "=" or not key:
            key, word = self._next_key(), key
        else:
            self.skip(char)
        if not key or len(key) > _LONGEST:
            return self._break(word)
        if not self.out.in_call:
            self.out.start(self._name)
        self.out.arguments((", " if self._keys else "{") + f'"{quoted(key)}": ')
        self._keys += 1
        self._value = PythonValue()
        self._value.push(word, 0)
        self.state = self._read_value
        return True

    def _next_key(self) -> str:
        """The name of the parameter that an argument without one is for."""
        tool = next((tool for tool in self.inputs.tools if tool.name == self._name), None)
        schema = tool.parameters if tool else None
        properties = schema.get("properties") if isinstance(schema, dict) else None
        names = list(properties) if isinstance(properties, dict) else []
        return str(names[self._keys]) if self._keys < len(names) else ""

    def _read_value(self) -> bool:
        part, end = self._value.push(*self.scan.view())
        self.scan.seek(end)
        self.out.arguments(part)
        if self._value.broken:
            return self._break(self._value.rest)
        if self._value.done:
            self.state = self._after_value
        return self._value.done

    def _after_value(self) -> bool:
        char = self._space()
        if char == ")":
            return self._end_call()
        if char and char != ",":
            return self._break()
        self.skip(char)
        self.state = self._read_argument if char else self._after_value
        return bool(char)

    def _break(self, rest: str = "") -> bool:
        """`rest`, which was read, and what follows fit no call: they are text."""
        if not self.out.in_call:
            return self.give_up()
        self.close_call(complete=False)
        self.out.text(rest)
        return True

    def _end_call(self) -> bool:
        self.skip(")")
        if not self.out.in_call:
            self.out.start(self._name)
        self.out.arguments("}" if self._keys else "{}")
        self.close_call(unclosed=self._marked)
        self._listed = True
        self.state = self._after_call
        return True

    def _end_list(self) -> bool:
        self.skip("]")
        self.raw, self.state = [], self.read_text
        return True

    def _after_call(self) -> bool:
        self.out.text(self.scan.skip_space())
        char = self.scan.peek()
        if char == "]":
            return self._end_list()
        if char == ",":
            self._pass(char)
            self.state = self._read_name
        elif char:
            self.state = self.read_text
        return bool(char)


def _speaks(source: str) -> bool:
    return _SPOKEN.search(source) is not None and "<function_calls>" not in source


PYTHONIC = Format(
    "pythonic",
    (THINK, END_THINK, *_OPENERS, *_CLOSERS),
    _PythonicParser,
    _speaks,
    think_starts_in,
)
