# SPDX-License-Identifier: MIT
"""`Answer`: what one choice has said, block by block. Knows events, no token ids, no dialect."""

import secrets
from collections.abc import Sequence
from typing import Literal

from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Channel,
    ChannelParser,
    Content,
    Event,
    Piece,
    Reasoning,
)

Kind = Literal["reasoning", "content", "call"]


class Block:
    """A run of reasoning or content, or one tool call; a call's text is its arguments' JSON."""

    def __init__(self, kind: Kind, name: str = "", call_id: str = "") -> None:
        self.kind, self.name, self.call_id = kind, name, call_id
        self.complete = kind != "call"
        self._parts: list[str] = []

    def add(self, text: str) -> None:
        self._parts.append(text)

    @property
    def text(self) -> str:
        """All of it so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""


class Answer:
    """Feeds a parser and keeps the blocks that its events make.

    `max_calls`: further calls are left out; the answer is `full` with the last one allowed.
    """

    def __init__(
        self, parser: ChannelParser, starts_in: Channel, max_calls: int | None = None
    ) -> None:
        self.blocks: list[Block] = []
        self.num_reasoning_tokens = 0
        self.full = False  # no further call may follow
        self._parser, self._max_calls = parser, max_calls
        self._kind: Kind = starts_in
        self._events: list[Event] = []
        self._num_calls = 0

    def push(self, pieces: Sequence[Piece]) -> None:
        """The text of one token."""
        if events := self._parser.push(pieces):
            self._take(events)
        if self._kind == "reasoning":
            self.num_reasoning_tokens += 1

    def finish(self, pieces: Sequence[Piece]) -> None:
        """What text was left, and the end of the answer."""
        self._take(self._parser.push(pieces))
        self._take(self._parser.finish())

    def take(self) -> list[Event]:
        """The events since the last call. Every `CallStart` has its id."""
        events, self._events = self._events, []
        return events

    @property
    def has_calls(self) -> bool:
        """Whether a tool call has begun."""
        return self._num_calls > 0

    @property
    def calls(self) -> list[Block]:
        """The tool calls."""
        return [block for block in self.blocks if block.kind == "call"]

    def text(self, kind: Kind) -> str | None:
        """All blocks of a kind joined; None if there is none."""
        found = [block.text for block in self.blocks if block.kind == kind]
        return "".join(found) if found else None

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if self.full:
                return
            match event:  # the most frequent first
                case Content(text):
                    self._add("content", text)
                case Reasoning(text):
                    self._add("reasoning", text)
                case CallArguments(text):
                    self.blocks[-1].add(text)
                case CallStart(name, call_id):
                    self._num_calls += 1
                    event = CallStart(name, call_id or f"call_{secrets.token_hex(12)}")
                    self._open(Block("call", name, event.id or ""))
                case CallEnd(complete):
                    self.blocks[-1].complete = complete
                    self._look_if_full()
            self._events.append(event)

    def _add(self, kind: Kind, text: str) -> None:
        if self._kind != kind or not self.blocks:
            self._open(Block(kind))
        self.blocks[-1].add(text)

    def _open(self, block: Block) -> None:
        self._kind = block.kind
        self.blocks.append(block)
        self._look_if_full()

    def _look_if_full(self) -> None:
        self.full = self._num_calls == self._max_calls and self.blocks[-1].complete
