# SPDX-License-Identifier: MIT
"""`Blocks`: writes an answer's events, and the rules for white space between them. Reads nothing.

Line breaks around reasoning and around calls are no part of either; white space alone between two
calls is nothing. All else is given out as it came.
"""

from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Channel,
    Content,
    Event,
    Reasoning,
)

_SPACE = " \t\r\n"
_BREAKS = "\r\n"


class Blocks:
    """`channel` is where text goes. `blank`: only white space stands in the block so far."""

    def __init__(self, channel: Channel) -> None:
        self.channel: Channel = channel
        self.blank = True
        self.in_call = False
        self._first = channel == "content"  # an answer that begins with content is kept as it is
        self._space: list[str] = []  # white space that is given out if text follows
        self._events: list[Event] = []

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def text(self, text: str) -> None:
        """Adds to the channel. There must be no call open."""
        body = text.rstrip(_SPACE)
        if body:
            space = text[len(body) :]
            if self._space:
                body = "".join(self._space) + body
                self._space = []
            if self.blank:
                self.blank = False
                body = body if self._first else body.lstrip(_BREAKS)
            self._write(body)
            text = space
        if text:
            self._space.append(text)

    def end_block(self, channel: Channel) -> None:
        """A marker ended the text; what follows goes to `channel`."""
        space = "".join(self._space).rstrip(_BREAKS)
        if space and not self.blank:
            self._write(space)
        self.channel, self.blank, self._first, self._space = channel, True, False, []

    def start(self, name: str, call_id: str | None = None) -> None:
        """A call begins. What follows it is content."""
        self.end_block("content")
        self._events.append(CallStart(name, call_id))
        self.in_call = True

    def arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(text))

    def end(self, complete: bool = True) -> None:
        """The call is over."""
        self._events.append(CallEnd(complete))
        self.in_call = False

    def finish(self) -> None:
        """The answer is over. White space at the end of content is the model's own."""
        if self.in_call:
            self.end(complete=False)
        space = "".join(self._space)
        if space and self.channel == "content" and (self._first or not self.blank):
            self._write(space)
        self._space = []

    def _write(self, text: str) -> None:
        self._events.append(Reasoning(text) if self.channel == "reasoning" else Content(text))
