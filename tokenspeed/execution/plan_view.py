# SPDX-License-Identifier: MIT
"""NumPy views on the words of a Plan, and the words of a StepResult.

The layouts are described in csrc/scheduler/plan.h; the constants below repeat its enumerators and
nothing else here knows a word's position. Knows int32 words, no tensors and no requests.
"""

from collections.abc import Sequence
from functools import cached_property
from operator import mul
from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]

PLAN_MAGIC: Final = 0x4C505354
RESULT_MAGIC: Final = 0x53525354
LAYOUT_VERSION: Final = 3
STEP_VERSION: Final = 3  # of `execution/step_message.py`; here, as no tensor is needed to know it

HEADER_WORDS: Final = 16
SECTIONS: Final = (7, 1, 4, 4, 4)  # words of a row, token, delta, copy, bind
RESULT_HEADER_WORDS: Final = 8

ROW_SAMPLE: Final = 1
ROW_PROMPT_LOGPROBS: Final = 2
ROW_PREFILL: Final = 4
TOKEN_FROM_DEVICE: Final = -1
ROW_OK: Final = 0
ROW_FAILED: Final = 1


class PlanView:
    """The sections of one plan, without a copy. `ValueError` if the words are not a plan.

    `words`: all of them. Shapes: slots, flags, starts, num_tokens, num_draft, num_propose
    [num_rows]; tokens [num_tokens]; deltas [num_deltas, 4] (group, slot, index, page); copies
    [num_copies, 4]; binds [num_binds, 4].
    """

    def __init__(self, words: Words) -> None:
        if words.size < HEADER_WORDS or words[0] != PLAN_MAGIC or words[1] != LAYOUT_VERSION:
            raise ValueError("not a plan of this layout's version")
        size, _, _, *counts, only_decodes = words[2:11].tolist()
        if size != words.size or size != HEADER_WORDS + sum(map(mul, counts, SECTIONS)):
            raise ValueError(f"a plan of {words.size} words does not hold what its header counts")
        self.words = words
        self.step_words = words[3:5]
        sections, at = [], HEADER_WORDS
        for count, width in zip(counts, SECTIONS, strict=True):
            sections.append(words[at : at + count * width].reshape(count, width))
            at += count * width
        rows, tokens, self.deltas, self.copies, self.binds = sections
        self.num_rows = len(rows)
        columns = rows.T
        self.slots, self.flags, self.starts, self.num_tokens, self.num_draft = columns[:5]
        self.num_propose = columns[6]
        # Each row samples after its one token, and nothing is proposed.
        self.only_decodes = bool(only_decodes)
        self.tokens = tokens[:, 0]

    @cached_property
    def num_places(self) -> NDArray[np.int32]:
        """[num_rows] tokens of each row, its last ones, after which an id is sampled."""
        places: NDArray[np.int32] = (self.flags & ROW_SAMPLE) * (self.num_draft + 1)
        return places

    @cached_property
    def sample_index(self) -> NDArray[np.int64]:
        """[sum(num_places)] these tokens of all rows, in row order."""
        places = self.num_places
        last = np.cumsum(self.num_tokens, dtype=np.int64)[places > 0] - 1
        if len(last) == places.sum():
            return last
        ahead = places[places > 0]
        ends = np.cumsum(ahead)
        return np.arange(ends[-1]) + np.repeat(last + 1 - ends, ahead)

    def bound_request_ids(self) -> list[int]:
        """[num_binds] the 64-bit request ids, put together from their halves."""
        halves = np.ascontiguousarray(self.binds[:, 1:3]).view(np.uint32).astype(np.uint64)
        ids: list[int] = (halves[:, 0] | halves[:, 1] << np.uint64(32)).tolist()
        return ids

    def result(
        self, ids: NDArray[np.integer], counts: NDArray[np.integer], failed: NDArray[np.bool_]
    ) -> Words:
        """The StepResult of this plan.

        `ids` [sum(counts)] are those that rows accept, in row order; `counts` [num_rows], 0 where a
        row does not sample or failed.
        """
        end = RESULT_HEADER_WORDS + 3 * self.num_rows
        size, count = end + len(ids), len(ids)
        words = np.empty(size, np.int32)
        step = self.step_words
        words[:8] = RESULT_MAGIC, LAYOUT_VERSION, size, *step, self.num_rows, count, 0
        rows = words[RESULT_HEADER_WORDS:end].reshape(-1, 3)
        rows[:, 0] = self.slots
        rows[:, 1] = failed  # ROW_FAILED is 1
        rows[:, 2] = counts
        words[end:] = ids
        return words


Plans = Sequence[PlanView | None]  # of a step, by dp index; None where there is none
