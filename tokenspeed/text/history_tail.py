# SPDX-License-Identifier: MIT
"""`Tails`: the text that a chat template writes after an assistant's turn. Knows no ids.

The turn's words are replaced by ones that nobody says, and what comes after them is cut behind the
marker that ends a turn. Most templates write that part in the same way whatever came before; then
a conversation of a few messages stands for the whole one. Whether a template is so is tried out
(`_is_local`) before it is believed, for every set of options that is asked for.
"""

import json
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenspeed.errors import RequestError
from tokenspeed.text.canonical_probe import Render
from tokenspeed.text.conversation import Conversation, Tool
from tokenspeed.text.history_probe import CASES, STUB_TOOL, TOOLS

_MAX_SHAPES = 256  # sets of options that are remembered

log = logging.getLogger("tokenspeed.text")

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Tail:
    """`text` follows the turn. `after_stop`: it follows the token that ended it; else that token
    is not what the template writes there, and goes."""

    text: str
    after_stop: bool


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a turn's end may depend on."""

    options: str
    tools: bool
    calls: bool
    system: bool


class _TooCostly(Exception):  # noqa: N818
    """The template was stopped."""


class Tails:
    """`added` are the vocabulary's added tokens, `ends` the texts of tokens that end an answer."""

    def __init__(self, render: Render, added: Iterable[str], ends: Iterable[str]) -> None:
        self._render = render
        self._added, self._ends = tuple(added), tuple(ends)
        self._words = f"Zq{secrets.token_hex(12)}"
        self._closings: dict[_Shape, tuple[str, ...]] = {}
        self._local: dict[tuple[str, bool], bool] = {}
        self.is_usable = True  # False: trying the template out cost too much
        self._told = False

    def tail(self, conversation: Conversation, at: int, stop: str | None) -> Tail | None:
        """What follows the assistant's message `at`, which ended with the added token `stop`.

        None if that cannot be told; then the conversation must be rendered as a whole.
        """
        try:
            found = self._tail(conversation, at, stop)
        except _TooCostly:
            return None
        if found is None and not self._told:
            self._told = True
            log.warning("the chat template's turns cannot be told apart: they are rendered anew")
        return found

    def _tail(self, conversation: Conversation, at: int, stop: str | None) -> Tail | None:
        if not self.is_usable:
            return None
        options = json.dumps(conversation.options, sort_keys=True, default=str)
        local = self._is_local(options, conversation)
        after = self._after(conversation, at, reduced=local)
        if after is None:
            return None
        spoken = conversation.messages[at]
        calls = bool(spoken.get("tool_calls"))
        system = conversation.messages[0].get("role") == "system"
        shape = _Shape(options, bool(conversation.tools), calls, system)
        said = closings = self._closings_of(shape, conversation, spoken)
        if calls:
            said = self._closings_of(replace(shape, calls=False), conversation, {})
        return self._cut(after, closings, self._markers(said), stop)

    def is_local(self, options: dict[str, Any] | None = None, tools: bool = False) -> bool:
        """Whether what follows a turn depends on nothing before it."""
        given = Conversation([], TOOLS if tools else (), options or {})
        return self._is_local(json.dumps(given.options, sort_keys=True, default=str), given)

    def _is_local(self, options: str, like: Conversation) -> bool:
        key = (options, bool(like.tools))
        found = self._local.get(key)
        if found is None:
            try:
                found = self._try(like)
            except _TooCostly:
                found = False
                # Options of a client's own speak for no other.
                self.is_usable = self.is_usable and options != "{}"
            if len(self._local) >= _MAX_SHAPES:
                self._local.clear()
            self._local[key] = found
        return found

    def _try(self, like: Conversation) -> bool:
        tools = TOOLS if like.tools else ()
        tried = 0
        for case in CASES:
            if case.needs_tools and not tools:
                continue
            made = Conversation(case.messages, tools, like.options)
            whole = self._after(made, case.at, reduced=False)
            if whole is None:
                continue  # this template cannot say that
            tried += 1
            if whole != self._after(made, case.at, reduced=True):
                return False
        return tried > 0

    def _cut(
        self, after: str, closings: tuple[str, ...], markers: tuple[str, ...], stop: str | None
    ) -> Tail | None:
        closing = next((c for c in closings if after.startswith(c)), None)
        if closing is None:
            return None
        if stop is not None:
            if (found := closing.find(stop)) >= 0:
                return Tail(after[found + len(stop) :], True)
            if after.startswith(stop, len(closing)):
                return Tail(after[len(closing) + len(stop) :], True)
        places = [place for marker in markers if (place := closing.find(marker)) >= 0]
        return Tail(after[min(places, default=len(closing)) :], False)

    def _markers(self, closings: tuple[str, ...]) -> tuple[str, ...]:
        """Texts that end a turn: of tokens that end answers, and what follows content."""
        begins = [t for c in closings for t in self._added if c.lstrip().startswith(t)]
        return self._ends + tuple(begins)

    def _closings_of(
        self, shape: _Shape, like: Conversation, spoken: dict[str, Any]
    ) -> tuple[str, ...]:
        """What may stand between the turn's words and the next turn.

        Templates end a last turn otherwise than one in the middle, or only with a generation
        prompt after it, which is then taken off.
        """
        found = self._closings.get(shape)
        if found is None:
            found = self._find_closings(like, spoken)
            if len(self._closings) >= _MAX_SHAPES:
                self._closings.clear()
            self._closings[shape] = found
        return found

    def _find_closings(self, like: Conversation, spoken: dict[str, Any]) -> tuple[str, ...]:
        alone = [{"role": "user", "content": "u"}]
        ends = [*_opening(like.messages), self._stand_in(spoken)]
        without, with_prompt = (
            self._text(alone, like, reduced=True, prompt=prompt) for prompt in (False, True)
        )
        prompt = ""
        if without is not None and with_prompt is not None and with_prompt.startswith(without):
            prompt = with_prompt[len(without) :]
        closings = []
        for asked in (False, True):
            text = self._text(ends, like, reduced=True, prompt=asked)
            if text is not None and text.count(self._words) == 1:
                closing = text.partition(self._words)[2]
                closings.append(closing.removesuffix(prompt) if asked else closing)
        return tuple(closings)

    def _after(self, conversation: Conversation, at: int, reduced: bool) -> str | None:
        """The text after the words of the turn `at`."""
        messages = conversation.messages
        before = _opening(messages) if reduced else messages[:at]
        made = [*before, self._stand_in(messages[at]), *messages[at + 1 :]]
        text = self._text(made, conversation, reduced, conversation.add_generation_prompt)
        if text is None or text.count(self._words) != 1:
            return None
        return text.partition(self._words)[2]

    def _stand_in(self, message: dict[str, Any]) -> dict[str, Any]:
        """The same turn with other words: in its last call's arguments, or in its content."""
        calls = message.get("tool_calls")
        if not calls:
            return {"role": "assistant", "content": self._words}
        made = [
            {**call, "function": {**call["function"], "arguments": {}}}
            for call in calls
            if isinstance(call, dict) and isinstance(call.get("function"), dict)
        ]
        if made:
            made[-1]["function"]["arguments"] = {"text": self._words}
        return {"role": "assistant", "content": "", "tool_calls": made}

    def _text(
        self, messages: Messages, like: Conversation, reduced: bool, prompt: bool
    ) -> str | None:
        tools: Sequence[Tool] = like.tools
        if tools and reduced:
            tools = (STUB_TOOL,)
        try:
            return self._render(
                list(messages),
                tools=[tool.definition() for tool in tools] or None,
                add_generation_prompt=prompt,
                **like.options,
            )
        except RequestError as error:
            if error.code == "template_limit":
                raise _TooCostly from None
            return None


def _opening(messages: Messages) -> list[dict[str, Any]]:
    """Stands for everything before a turn."""
    user = {"role": "user", "content": "u"}
    if messages and messages[0].get("role") == "system":
        return [{"role": "system", "content": "s"}, user]
    return [user]
