# SPDX-License-Identifier: MIT
"""Prompts as rows of text segments, cut into blocks: the same text at the same place is one id.

A block that begins in a shared segment (a client's system prompt) is looked up by what it covers;
one that begins in a session's own text is new unless it is kept from the prompt before. Knows no
lengths' distribution and no session.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text: `tokens` of it."""

    number: int
    tokens: int
    shared: bool  # by several sessions


class Texts:
    """All segments and blocks of one workload."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._segments: dict[tuple[object, ...], Segment] = {}
        self._blocks: dict[tuple[int, ...], int] = {}
        self._num_segments = self._num_blocks = 0

    def own(self, tokens: int) -> Segment:
        """New text."""
        self._num_segments += 1
        return Segment(self._num_segments, tokens, shared=False)

    def shared(self, tokens: int, *what: object) -> Segment:
        """The text that is known as `what`, of `tokens` tokens when it is asked for first."""
        if what not in self._segments:
            self._num_segments += 1
            self._segments[what] = Segment(self._num_segments, tokens, shared=True)
        return self._segments[what]

    def blocks(self, segments: Sequence[Segment], kept: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The whole blocks of a prompt that begins with the blocks `kept`."""
        size, place, found = self.block_size, 0, list(kept)
        end = sum(segment.tokens for segment in segments) // size * size
        block = len(kept) * size
        for index, segment in enumerate(segments):
            while block < min(place + segment.tokens, end):
                covered, reach = [segment.number, block - place], place + segment.tokens
                for later in segments[index + 1 :]:
                    if reach >= block + size:
                        break
                    covered.append(later.number)
                    reach += later.tokens
                found.append(self._block(tuple(covered), segment.shared))
                block += size
            place += segment.tokens
        return tuple(found)

    def _block(self, covered: tuple[int, ...], shared: bool) -> int:
        if not shared:
            self._num_blocks += 1
            return self._num_blocks
        if covered not in self._blocks:
            self._num_blocks += 1
            self._blocks[covered] = self._num_blocks
        return self._blocks[covered]
