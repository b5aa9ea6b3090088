# SPDX-License-Identifier: MIT
"""`Detokenizer`: a stream of ids to a stream of text, one per output. Knows no HTTP, no engine.

Text that was given out is final: a multi-byte character leaves whole, and what may be the start
of a stop string is held back until it is known not to be one. The result never depends on how the
ids were grouped into steps.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenspeed.errors import RequestError
from tokenspeed.text.channels import Piece
from tokenspeed.text.tokenizer import Tokenizer

MAX_STOPS = 32
MAX_STOP_CHARS = 1024
_MAX_PENDING = 16  # ids after which an unfinished character is given out as it is
_TAIL = 6  # prompt ids that give the first output id its context


def check_stop(stop: Sequence[str]) -> None:
    """Raises `RequestError` for stop strings that are empty, too long or too many."""
    if len(stop) > MAX_STOPS:
        raise RequestError(f"stop: at most {MAX_STOPS} strings", field="stop")
    if not all(0 < len(s) <= MAX_STOP_CHARS for s in stop):
        raise RequestError(f"stop: strings of 1 to {MAX_STOP_CHARS} characters", field="stop")


class _Stop:
    """Looks for one stop string in a stream of text (Knuth, Morris, Pratt 1977)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0  # characters of the pattern that end the text seen so far
        self._back = [0] * len(pattern)
        k = 0
        for i in range(1, len(pattern)):
            while k and pattern[i] != pattern[k]:
                k = self._back[k - 1]
            k += pattern[i] == pattern[k]
            self._back[i] = k

    def feed(self, text: str) -> int:
        """The index just after the first complete match in `text`, or 0 if there is none."""
        pattern, k, i, end = self.pattern, self.matched, 0, len(text)
        while i < end:
            if k == 0:
                i = text.find(pattern[0], i)
                if i < 0:
                    break
                k, i = 1, i + 1
            else:
                while k and text[i] != pattern[k]:
                    k = self._back[k - 1]
                k += text[i] == pattern[k]
                i += 1
            if k == len(pattern):
                self.matched = 0
                return i
        self.matched = k
        return 0


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """Byte-level vocabularies: a token is bytes, so an incremental UTF-8 decoder is exact."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes, self._texts = tokenizer.token_bytes, tokenizer.whole_texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._within = False  # a character whose last bytes are still to come

    def push(self, token_id: int) -> str:
        if not self._within and (text := self._texts[token_id]) is not None:
            return text
        text = self._decoder.decode(self._bytes(token_id))
        self._within = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _WindowDecoder:
    """Any other vocabulary: decodes a short window of ids twice and gives out the difference."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._decode = tokenizer.inner.decode
        self._ids = list(prompt_ids[-_TAIL:])
        self._given = len(self._ids)  # ids before this one have been given out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._take(final=len(self._ids) - self._given > _MAX_PENDING)

    def finish(self) -> str:
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        text = self._decode(self._ids, skip_special_tokens=False)
        if text.endswith("\ufffd") and not final:
            return ""
        before = self._decode(self._ids[: self._given], skip_special_tokens=False)
        del self._ids[: self._given]
        self._given = len(self._ids)
        return text[len(before) :]


class Detokenizer:
    """One output's text. `stopped` is the stop string that ended it, once one did.

    `num_tokens` counts ids up to and including the one that completed the stop string; ids pushed
    after that are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
        shown: frozenset[str] = frozenset(),
    ) -> None:
        check_stop(stop)
        self.stopped: str | None = None
        self.num_tokens = 0
        self._added = tokenizer.added_tokens
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._skip = {i for i in skipped if self._added[i] not in shown}
        self._decoder: _Decoder = (
            _ByteDecoder(tokenizer)
            if tokenizer.is_byte_level
            else _WindowDecoder(tokenizer, prompt_ids)
        )
        self._stops = [_Stop(pattern) for pattern in stop]
        self._include_stop = include_stop
        self._min_tokens = min_tokens  # stop strings count only in text after these
        self._held = ""  # the longest suffix that may yet become a stop string

    def push(self, ids: Sequence[int], *, ended_by_token: bool = False) -> str:
        """Text that became certain. With `ended_by_token` the last id is a stop token: it counts,
        but its text is shown only if stop strings are to be included."""
        if len(ids) == 1:
            return self._text(ids[0], ended_by_token)
        last = len(ids) - 1
        return "".join([self._text(t, ended_by_token and i == last) for i, t in enumerate(ids)])

    def pieces(self, token_id: int, *, ended_by_token: bool = False) -> tuple[Piece, ...]:
        """The same text of one id, an added token apart, but for one that may begin a stop
        string."""
        text = self._text(token_id, ended_by_token)
        if token_id in self._added and text:
            added = self._added[token_id]
            if text.endswith(added):
                return Piece(text[: -len(added)]), Piece(added, token=True)
        return (Piece(text),)

    def _text(self, token_id: int, ended: bool) -> str:
        """What becomes certain with an id, which is a stop token if it `ended` the output."""
        if self.stopped is not None:
            return ""
        self.num_tokens += 1
        if token_id in self._skip or (ended and not self._include_stop):
            return ""
        text = self._decoder.push(token_id)
        if text and self._stops and self.num_tokens > self._min_tokens:
            text = self._match(text)
        return text

    def finish(self) -> str:
        """The rest: unfinished bytes as U+FFFD, then what was held back. Call once, at the end."""
        if self.stopped is not None:
            return ""
        text = self._decoder.finish()
        if text and self._stops and self.num_tokens > self._min_tokens:
            text = self._match(text)
        held, self._held = self._held, ""
        return text + (held if self.stopped is None else "")

    def _match(self, text: str) -> str:
        """Looks for the stop string that is complete first (of several, the longest)."""
        found = [(end, -len(s.pattern), s.pattern) for s in self._stops if (end := s.feed(text))]
        buffer = self._held + text
        if found:
            end, minus_length, self.stopped = min(found)
            cut = len(self._held) + end + (0 if self._include_stop else minus_length)
            self._held = ""
            return buffer[:cut]
        keep = max(s.matched for s in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]
