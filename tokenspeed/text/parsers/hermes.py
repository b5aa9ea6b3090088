# SPDX-License-Identifier: MIT
"""`hermes`: JSON calls in `<tool_call>` tags, as Qwen 2.5 and 3, Hermes and others write them.

    <think>..</think> text <tool_call>{"name": .., "arguments": {..}}</tool_call> ..

A call whose JSON breaks after its name keeps the rest, up to the closing tag, as arguments.
"""

from tokenspeed.text.channels import Format, Inputs
from tokenspeed.text.parsers.json_call import JsonCall
from tokenspeed.text.parsers.thinking import (
    END_THINK,
    THINK,
    ThinkParser,
    think_starts_in,
)

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(ThinkParser):
    openers = (_OPEN,)
    closers = (_CLOSE,)

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._call = JsonCall(self.out)

    def opened(self, marker: str) -> None:
        self._call = JsonCall(self.out)
        self.state = self._read_call

    def cut(self) -> None:
        self._call.flush()
        if self.out.in_call:
            self.close_call(self._call.complete)
        else:
            self.give_up()

    def _read_call(self) -> bool:
        text, at = self.scan.view()
        end = self._call.feed(text, at)
        self.scan.seek(end)
        if not self.out.in_call:
            self.raw.append(text[at:end])
        if self._call.broken:
            return self._broken()
        return self._call.done and self.close_call(self._call.complete, unclosed=True)

    def _broken(self) -> bool:
        if not self.out.in_call:
            return self.give_up()
        if self._call.complete:
            return self.close_call(unclosed=True)
        self._call.flush()
        self.state = self._read_rest
        return True

    def _read_rest(self) -> bool:
        """Arguments that are no JSON, up to the closing tag."""
        text, marker = self.scan.take(_CLOSE, _OPEN, keep=True)
        self.out.arguments(text)
        return marker is not None and self.close_call(complete=False, unclosed=True)


def _speaks(source: str) -> bool:
    return _OPEN in source and "arguments" in source


HERMES = Format("hermes", (THINK, END_THINK, _OPEN, _CLOSE), HermesParser, _speaks, think_starts_in)
