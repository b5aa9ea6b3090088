# SPDX-License-Identifier: MIT
"""`Systems`: what a chat template does with system messages, found by trying. Knows no rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenspeed.errors import RequestError

_WORDS = ("Aqzfirst", "Bqzsecond", "Cqzthird", "Dqzfourth", "Eqzfifth")


class Render(Protocol):
    """`ChatTemplate.render`, here or in another process."""

    def __call__(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Systems:
    """Where system messages appear in their place."""

    keeps_inline: bool = True  # after the first user message
    keeps_second: bool = True  # next to the first one
    keeps_developer: bool = True  # if their role is called so

    @property
    def keeps_all(self) -> bool:
        return self.keeps_inline and self.keeps_second and self.keeps_developer


def probe_systems(render: Render) -> Systems:
    """Tries. A template that cannot render a plain conversation is left alone."""
    if not _in_place(render, ("user", "assistant", "user")):
        return Systems()
    inline = _in_place(render, ("system", "user", "assistant", "system", "user"))
    # A user message in its place must do better.
    reminder = _in_place(render, ("system", "user", "assistant", "user", "user"))
    second = _in_place(render, ("system", "system", "user"))
    one = _in_place(render, ("system", "user"))
    developer = _in_place(render, ("developer", "user"))
    return Systems(inline or not reminder, second or not one, developer or not one)


def _in_place(render: Render, roles: Sequence[str]) -> bool:
    """Whether the messages' texts come out, each once, in their order."""
    words = _WORDS[: len(roles)]
    messages = [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
    try:
        text = render(messages)
    except RequestError:
        return False
    places = [text.find(word) for word in words]
    once = all(text.count(word) == 1 for word in words)
    return once and places == sorted(places)
