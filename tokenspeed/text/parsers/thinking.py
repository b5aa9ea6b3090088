# SPDX-License-Identifier: MIT
"""`ThinkParser`: answers of reasoning in `<think>` tags, content, and calls that markers open.

The base of the formats that are so; with no calls it is the format `think`. Knows no call's syntax.

- A marker that opens a call ends reasoning. If what follows is no call, it is text like any other.
- `<think>` counts where a block begins: at the answer's start and after a call. Elsewhere it is
  text, and so is the `</think>` after it. Any other `</think>` in content is dropped.
"""

from collections.abc import Callable, Sequence

from tokenspeed.text.channels import Channel, Event, Format, Inputs, Piece
from tokenspeed.text.parsers.blocks import Blocks
from tokenspeed.text.parsers.scanner import Scanner

THINK, END_THINK = "<think>", "</think>"

State = Callable[[], bool]


def think_starts_in(prompt_end: str) -> Channel:
    """Where an answer begins after a prompt that ends so."""
    return "reasoning" if prompt_end.rstrip().endswith(THINK) else "content"


class ThinkParser:
    """A state is a method that reads on; it returns False if it needs more text.

    A subclass gives the openers and `opened`, which sets `state`. From there it reads `scan` and
    writes `out`, adds what it read to `raw` until the call begins, and ends with `close_call` or,
    before the call begins, with `give_up`. `closers` are dropped after a call (and white space
    around them); `_unclosed` says that one is still to come.
    """

    openers: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()  # open a further call before the closer

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.scan = Scanner(inputs.tokens)
        self.out = Blocks(inputs.starts_in)
        self.state: State = self.read_text
        self.raw: list[str] = []
        self._unclosed = False
        self._quoted = False  # a <think> stands in the text and its </think> is still to come

    def push(self, pieces: Sequence[Piece]) -> list[Event]:
        for piece in pieces:
            self.scan.add(piece)
            while self.state():
                pass
        return self.out.take()

    def finish(self) -> list[Event]:
        self.scan.close()
        if self.state == self.read_text and self._unclosed and self.out.blank:
            self.scan.cut(*self.closers)
        self._run()
        if self.state != self.read_text:
            self.cut()
            self._run()
        self.out.finish()
        return self.out.take()

    def _run(self) -> None:
        while self.state():
            pass

    def read_text(self) -> bool:
        """Reasoning or content, up to the next marker."""
        text, marker = self.scan.take(THINK, END_THINK, *self._calls())
        if text:
            self.out.text(text)
        if marker is None:
            return False
        if marker == THINK:
            self._think()
        elif marker == END_THINK:
            self._end_think()
        elif marker in self.openers or marker in self.inner:
            self.raw = [marker]
            self.opened(marker)
        else:
            self.out.end_block("content")
            self._unclosed = False
        return True

    def opened(self, marker: str) -> None:
        """`marker` was read, which opens a call: sets `state`."""
        raise RuntimeError(f"{marker!r} opens calls, which nobody reads")

    def cut(self) -> None:
        """The answer ended in the middle of a call."""
        if self.out.in_call:
            self.close_call(complete=False)
        else:
            self.give_up()

    def give_up(self) -> bool:
        """What was read since the opener is no call but text."""
        self.out.text("".join(self.raw))
        self.raw, self.state = [], self.read_text
        return True

    def close_call(self, complete: bool = True, unclosed: bool = False) -> bool:
        """The call has ended; with `unclosed` one of `closers` may still follow."""
        self.out.end(complete)
        self.raw, self.state, self._unclosed = [], self.read_text, unclosed
        return True

    def _calls(self) -> tuple[str, ...]:
        return (*self.openers, *self.inner, *self.closers) if self._unclosed else self.openers

    def _think(self) -> None:
        if self.out.blank:
            self.out.end_block("reasoning")
        else:
            self.out.text(THINK)
            self._quoted = self.out.channel == "content"

    def _end_think(self) -> None:
        if self.out.channel == "reasoning":
            self.out.end_block("content")
        elif self._quoted:
            self.out.text(END_THINK)
        self._quoted = False


def _thinks(source: str) -> bool:
    return END_THINK in source


THINKING = Format("think", (THINK, END_THINK), ThinkParser, _thinks, think_starts_in)
