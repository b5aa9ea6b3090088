# SPDX-License-Identifier: MIT
"""`StepCounts`: what the engine's steps were made of, since the start. Knows plans and seconds
that it is told; predicts nothing and keeps nothing of a single step.

Steps whose rows have one token each are the many: counting them costs nothing.
"""

from dataclasses import dataclass

from tokenspeed.execution.plan_view import ROW_PREFILL, Plans


@dataclass(slots=True)
class StepCounts:
    """Every token that a step computes is one of three: known before, a row's next, a draft."""

    num_steps: int = 0
    busy_s: float = 0.0  # in steps: planning, waiting for the devices, commits
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_draft_tokens: int = 0

    def planned(self, plans: Plans) -> None:
        """These plans make a step."""
        self.num_steps += 1
        for plan in plans:
            if plan is None:
                continue
            num_tokens = len(plan.tokens)
            if num_tokens == plan.num_rows:  # a prompt's single last token counts as decoding
                self.num_decode_tokens += num_tokens
                continue
            prefill = int(plan.num_tokens[plan.flags & ROW_PREFILL != 0].sum())
            drafted = int(plan.num_draft.sum())
            self.num_prefill_tokens += prefill
            self.num_draft_tokens += drafted
            self.num_decode_tokens += num_tokens - prefill - drafted
