# SPDX-License-Identifier: MIT
"""What a model's answer consists of: reasoning, content and tool calls, as a stream of events.

A format (`text/parsers/`) is one incremental state machine from pieces of text to events. However
the text was cut into pieces and pushes, the events joined are the same. Knows no format, no ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from tokenspeed.text.conversation import Tool

Channel = Literal["reasoning", "content"]


class Piece(NamedTuple):
    """Text of an answer. `token`: it is one added token of the vocabulary, such as `<think>`.

    Where a vocabulary has a format's marker as a token, text that only spells it is no marker.
    """

    text: str
    token: bool = False


class Reasoning(NamedTuple):
    text: str


class Content(NamedTuple):
    text: str


class CallStart(NamedTuple):
    """A tool call begins. `id` only where the format has ids of its own."""

    name: str
    id: str | None = None


class CallArguments(NamedTuple):
    """A part of the call's arguments: JSON text, an object once all parts are joined."""

    text: str


class CallEnd(NamedTuple):
    """The call is over. `complete`: its arguments are; False where the answer was cut."""

    complete: bool = True


Event = Reasoning | Content | CallStart | CallArguments | CallEnd
_TEXTS = (Reasoning, Content, CallArguments)


class ChannelParser(Protocol):
    """One answer's state. Every `CallStart` is followed by its `CallEnd` before anything else."""

    def push(self, pieces: Sequence[Piece]) -> list[Event]:
        """What became certain. Never raises: what fits no format is content (or reasoning)."""
        ...

    def finish(self) -> list[Event]:
        """The rest, once the answer has ended, whole or cut."""
        ...


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a parser is made with."""

    starts_in: Channel
    tools: Sequence[Tool]
    tokens: frozenset[str]  # the format's markers that the vocabulary has as tokens


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models writes its answers."""

    name: str
    markers: tuple[str, ...]  # all texts that the parser looks for
    make: Callable[[Inputs], ChannelParser]
    speaks: Callable[[str], bool]  # whether a chat template's source is of this format
    starts_in: Callable[[str], Channel]  # where an answer to a prompt that ends so begins
    channels_by_calls: bool = False  # the marker of a call also begins reasoning and content


def joined(events: Sequence[Event]) -> list[Event]:
    """The same events with neighbouring texts of a kind made one, for comparison."""
    made: list[Event] = []
    for event in events:
        if isinstance(event, _TEXTS):
            if not event.text:
                continue
            last = made[-1] if made else None
            if type(last) is type(event):
                made[-1] = type(event)(last.text + event.text)
                continue
        made.append(event)
    return made
