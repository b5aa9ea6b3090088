# SPDX-License-Identifier: MIT
"""`Scanner`: text that arrives in pieces, in which markers are looked for. Knows no format.

What may yet become a marker stays in the buffer; everything else is given out at once. The leftmost
marker counts, and of those that start at one place the longest. A marker that the vocabulary has as
a token is found only in a piece that is that token. Any other marker is found in the text, across
the borders of pieces. Time is linear in the text if the scanner is read dry after each `add`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from tokenspeed.text.channels import Piece

_SPACE = re.compile(r"[ \t\r\n]*")


class _Wanted:
    """A set of markers, ready to be looked for."""

    def __init__(self, markers: tuple[str, ...], tokens: frozenset[str]) -> None:
        self.tokens = tokens.intersection(markers)
        texts = sorted(set(markers) - tokens, key=len, reverse=True)
        self.pattern = _any_of(texts)
        self.starts = _any_of(sorted({text[0] for text in texts})).search
        self.prefixes = frozenset(text[:n] for text in texts for n in range(1, len(text)))
        self.reach = max(map(len, texts), default=1) - 1

    def hold(self, text: str, start: int) -> int:
        """Where the longest end of `text[start:]` that may become a marker begins."""
        end, prefixes = len(text), self.prefixes
        for at in range(max(start, end - self.reach), end):
            if text[at:] in prefixes:
                return at
        return end


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")


_wanted = lru_cache(maxsize=1024)(_Wanted)


class Scanner:
    """Call `add` with a piece, then read until there is nothing more; `close` after the last.

    `tokens` are the markers that the vocabulary has as tokens.
    """

    def __init__(self, tokens: frozenset[str]) -> None:
        self._tokens = tokens
        self._text = ""
        self._at = 0  # what stands before was read
        self._marks: list[tuple[int, str]] = []  # places of tokens that are markers
        self.closed = False

    def add(self, piece: Piece) -> None:
        text, is_token = piece
        left = self._text[self._at :]
        if self._marks:
            self._marks = [(at - self._at, mark) for at, mark in self._marks if at >= self._at]
        if is_token and text in self._tokens:
            self._marks.append((len(left), text))
        self._text, self._at = left + text, 0

    def close(self) -> None:
        """Nothing follows: nothing is held back from now on."""
        self.closed = True

    @property
    def empty(self) -> bool:
        return self._at == len(self._text)

    def take(self, *markers: str, keep: bool = False) -> tuple[str, str | None]:
        """Text up to the next of the markers, and that marker, which is read too unless `keep`.

        Without a marker in the buffer: the text that can be no part of one, and None.
        """
        wanted = _wanted(markers, self._tokens)
        text, start = self._text, self._at
        if not self._marks and wanted.starts(text, start) is None:  # as it is with most tokens
            self._at = len(text)
            return text[start:], None
        limit, token = self._token(wanted)
        more = token is None and not self.closed
        hold = wanted.hold(text, start) if more else limit
        found = wanted.pattern.search(text, start, limit)
        if found and (found.start() < hold or not more):
            hold, token = found.start(), found.group()
        elif more:
            token = None
        self._at = hold if keep or token is None else hold + len(token)
        return text[start:hold], token

    def expect(self, *markers: str) -> str | None:
        """Reads the marker that stands next. "" if none does, None if that is not yet known."""
        wanted = _wanted(markers, self._tokens)
        limit, token = self._token(wanted)
        if token is not None and limit == self._at:
            self._at += len(token)
            return token
        if token is None and not self.closed:
            rest = self._text[self._at : self._at + wanted.reach + 1]
            if rest in wanted.prefixes or not rest:
                return None
        found = wanted.pattern.match(self._text, self._at, limit)
        self._at = found.end() if found else self._at
        return found.group() if found else ""

    def cut(self, *markers: str) -> bool:
        """Whether the text is over in the middle of one of the markers; reads that if so."""
        rest = self._text[self._at :] if self.closed else ""
        found = rest in _wanted(markers, self._tokens).prefixes
        self._at = len(self._text) if found else self._at
        return found

    def skip_space(self) -> str:
        """Reads the spaces, tabs and line breaks that stand next."""
        found = _SPACE.match(self._text, self._at)
        start, self._at = self._at, found.end() if found else self._at
        return self._text[start : self._at]

    def peek(self) -> str:
        """The next character, or "" if there is none in the buffer."""
        return self._text[self._at : self._at + 1]

    def view(self) -> tuple[str, int]:
        """The buffer and where reading goes on; for readers that end without a marker."""
        return self._text, self._at

    def seek(self, at: int) -> None:
        """Reading goes on at `at` of the buffer that `view` gave."""
        self._at = at

    def _token(self, wanted: _Wanted) -> tuple[int, str | None]:
        """Place and text of the next token that is wanted, or the buffer's end and None."""
        for at, mark in self._marks:
            if at >= self._at and mark in wanted.tokens:
                return at, mark
        return len(self._text), None
