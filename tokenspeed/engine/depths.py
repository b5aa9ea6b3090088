# SPDX-License-Identifier: MIT
"""`Depths`: how deep each draft should be, learnt from steps and from what was sampled.

Brings plans and drafts into the arrays that `_policy` learns from. Knows no tokens; times are told.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import (
    Acceptance,
    DepthPolicy,
    StepTimeModel,
    experts_touched,
)
from tokenspeed.execution.plan_view import ROW_PREFILL, ROW_SAMPLE, PlanView

PLAIN_INTERVAL = 8  # of steps that only decode, every so many is learnt from, once enough are known
WELL_KNOWN = 256  # steps

Features = NDArray[np.float64]


@dataclass(slots=True)
class Offers:
    """Drafts to choose from, one entry each: of which request, by whom, how well and how long."""

    request_ids: list[int] = field(default_factory=list)
    drafters: list[int] = field(default_factory=list)
    match_lens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, request_id: int, drafter: int, match_len: int, length: int) -> None:
        self.request_ids.append(request_id)
        self.drafters.append(drafter)
        self.match_lens.append(match_len)
        self.lengths.append(length)

    def __len__(self) -> int:
        return len(self.request_ids)


@dataclass(slots=True)
class Findings(Offers):
    """What came of drafts: `lengths` leading tokens were sampled, and the next one was not."""

    missed: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Experts:
    """Of a layer: how many there are, and to how many a token goes. 0: the model is dense."""

    count: int = 0
    per_token: int = 0


class Depths:
    """Learns step times and acceptance, and chooses by them. One per engine."""

    def __init__(self, proposes: list[bool], max_drafts: int, experts: Experts) -> None:
        """`proposes`: whether each drafter has weights of its own, so that its drafts cost time."""
        self.findings = Findings()
        self._times = StepTimeModel()
        self._acceptance = Acceptance(len(proposes))
        self._policy = DepthPolicy(
            self._times,
            self._acceptance,
            proposes,
            num_experts=experts.count,
            experts_per_token=experts.per_token,
        )
        self._experts, self._max_drafts = experts, max_drafts
        self._num_plain = 0
        self.num_steps = 0
        self.predicted_s = self.measured_s = 0.0

    @property
    def error(self) -> float:
        """Median relative error of the latest predictions; 0 before the first."""
        return self._times.median_relative_error if self._times.num_observed else 0.0

    def better(self, request_id: int, one: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether the first token of the `one` draft (drafter, match_len) is as likely as the
        other's."""
        rate = self._acceptance.rate
        return rate(request_id, *one, 0) >= rate(request_id, *other, 0)

    def choose(self, offers: Offers, num_rows: int, num_verify: int, num_context: int) -> list[int]:
        """How much of each offer to take, in a step of `num_rows` decoding rows over `num_context`
        tokens that verifies `num_verify` tokens in any case."""
        base = self._features(num_rows, num_verify, 0, num_context, 0, 0)
        chosen: list[int] = self._policy.choose(
            base,
            np.array(offers.request_ids, np.uint64),
            np.array(offers.drafters, np.int32),
            np.array(offers.match_lens, np.int32),
            np.array(offers.lengths, np.int32),
            max(0, self._max_drafts - num_rows - num_verify),
        ).tolist()
        return chosen

    def features(self, plans: list[PlanView]) -> Features | None:
        """Of the step that these plans are; None: there is nothing to learn from this one."""
        rows = verify = prefill = context = propose = deepest = 0
        if self._times.num_observed >= WELL_KNOWN and all(map(_only_decodes, plans)):
            self._num_plain += 1
            if self._num_plain % PLAIN_INTERVAL:
                return None
        for plan in plans:
            is_prefill = plan.flags & ROW_PREFILL != 0
            if is_prefill.any():
                prefill += int(plan.num_tokens[is_prefill].sum())
            rows += int(((plan.flags & (ROW_SAMPLE | ROW_PREFILL)) == ROW_SAMPLE).sum())
            verify += int(plan.num_draft.sum())
            propose += int(plan.num_propose.sum())
            deepest = max(deepest, int(plan.num_propose.max(initial=0)))
            context += int(plan.starts.sum() + plan.num_tokens.sum())
        return self._features(rows, verify, prefill, context, propose, deepest)

    def observe(self, features: Features, seconds: float) -> None:
        """A step with these features took so long."""
        predicted = self._times.predict(features)[0]
        if self._times.observe(features, seconds):
            self.num_steps += 1
            self.predicted_s += predicted
            self.measured_s += seconds

    def learn(self) -> None:
        """Takes in the findings of a step."""
        found = self.findings
        if len(found):
            self._acceptance.observe(
                np.array(found.request_ids, np.uint64),
                np.array(found.drafters, np.int32),
                np.array(found.match_lens, np.int32),
                np.array(found.lengths, np.int32),
                np.array(found.missed, np.bool_),
            )
            self.findings = Findings()

    def forget(self, request_id: int) -> None:
        self._acceptance.forget(request_id)

    def _features(
        self, rows: int, verify: int, prefill: int, context: int, propose: int, deepest: int
    ) -> Features:
        touched = 0.0
        if self._experts.count:
            tokens = rows + verify + prefill
            touched = experts_touched(tokens, self._experts.count, self._experts.per_token)
        verifies = verify > 0
        counts = [1.0, rows, verify, prefill, context / 1000, touched, propose, verifies, deepest]
        return np.array(counts)


def _only_decodes(plan: PlanView) -> bool:
    """Whether each of its rows samples after its one token, and nothing is proposed."""
    if len(plan.tokens) != plan.num_rows or plan.num_propose.any():
        return False
    return not (plan.flags & ROW_PREFILL).any()
