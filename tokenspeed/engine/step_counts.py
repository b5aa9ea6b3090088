# SPDX-License-Identifier: MIT
"""`StepCounts`: what the engine's steps were made of, since the start. Knows plans' words and
seconds that it is told; predicts nothing and keeps nothing of a single step.

A step whose rows have one token each is read off its plan's header: such steps are the many, and
counting them must cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenspeed.execution.plan_view import HEADER_WORDS, ROW_PREFILL, SECTIONS, Words

_NUM_ROWS, _NUM_TOKENS = 5, 6  # words of a plan's header


@dataclass(slots=True)
class StepCounts:
    """Every token that a step computes is one of three: known before, a row's next, a draft."""

    num_steps: int = 0
    busy_s: float = 0.0  # in steps: planning, waiting for the devices, commits
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_draft_tokens: int = 0

    def planned(self, plans: Sequence[Words | None]) -> None:
        """These plans make a step."""
        self.num_steps += 1
        for words in plans:
            if words is None:
                continue
            num_rows, num_tokens = int(words[_NUM_ROWS]), int(words[_NUM_TOKENS])
            if num_tokens == num_rows:  # a prompt's single last token counts as decoding
                self.num_decode_tokens += num_tokens
                continue
            end = HEADER_WORDS + num_rows * SECTIONS[0]
            _, flags, _, tokens, drafts, *_ = words[HEADER_WORDS:end].reshape(num_rows, -1).T
            prefill, drafted = int(tokens[flags & ROW_PREFILL != 0].sum()), int(drafts.sum())
            self.num_prefill_tokens += prefill
            self.num_draft_tokens += drafted
            self.num_decode_tokens += num_tokens - prefill - drafted
