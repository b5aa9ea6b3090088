# SPDX-License-Identifier: MIT
"""`Replay`: the messages of each turn of one session. Knows texts; no dialect, no clock, no server.

With history "blocks" a prompt is one message of exactly the recorded blocks, the same for every
endpoint. With "answers" it is a conversation as a client holds it, and what the endpoint answered
stands where the recorded answer stood.
"""

from typing import Any, Protocol

from tokenspeed.bench.session import Session

HISTORIES = ("blocks", "answers")
_SILENCE = "nothing"  # for an answer without text, which servers refuse to take back


class Texts(Protocol):
    """`bench.prompts.Prompts`, as far as it is needed here."""

    def text(self, session: Session, index: int) -> str: ...
    def answer(self, session: Session, index: int) -> str: ...
    def conversation(self, session: Session, index: int) -> list[tuple[str, str]]: ...


class Replay:
    """One session's turns in their order. `answered` is told what came, `messages` asks."""

    def __init__(self, session: Session, texts: Texts, history: str) -> None:
        if history not in HISTORIES:
            raise ValueError(f"history: must be one of {', '.join(HISTORIES)}, got {history!r}")
        self.session, self._texts = session, texts
        self._echoes = history == "answers"
        self._came: dict[str, str] = {}  # by the recorded answer
        self._said: dict[int, list[tuple[str, str]]] = {}  # of the turn at hand and the next one

    def messages(self, index: int) -> tuple[dict[str, Any], ...]:
        """The prompt of a turn."""
        if not self._echoes:
            said = [("user", self._texts.text(self.session, index))]
        else:
            said = self._conversation(index)
        return tuple(
            {"role": role, "content": self._came.get(text, text) if role == "assistant" else text}
            for role, text in said
        )

    def answered(self, index: int, text: str) -> None:
        """What the endpoint said to a turn."""
        if not self._echoes or index + 1 == len(self.session.turns):
            return
        before, after = self._conversation(index), self._conversation(index + 1)
        del self._said[index]
        # A prompt that does not go on from this one holds no answer to it.
        if after[: len(before)] == before and after[len(before) :]:
            role, recorded = after[len(before)]
            if role == "assistant":
                self._came[recorded] = text if text.strip() else _SILENCE

    def _conversation(self, index: int) -> list[tuple[str, str]]:
        if index not in self._said:
            self._said[index] = self._texts.conversation(self.session, index)
        return self._said[index]

    def dictated(self, index: int) -> str:
        """The text that the recording holds for the answer."""
        return self._texts.answer(self.session, index)
