# SPDX-License-Identifier: MIT
"""`StepTimes`: one engine's model of how long its steps take, and how well it foretells them.

Brings plans into the features that `_policy.StepTimeModel` learns from. Times are told; decides
nothing.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import StepTimeModel, experts_touched
from tokenspeed.engine.messages import StepTimeStats
from tokenspeed.execution.plan_view import ROW_PREFILL, ROW_SAMPLE, Plans

# The first steps are all learnt from; later, of those that only decode, one in so many.
WELL_KNOWN, PLAIN_INTERVAL = 256, 32

Features = NDArray[np.float64]  # [F], in the order of `_policy.FEATURES`


@dataclass(frozen=True, slots=True)
class Experts:
    """Of a layer: how many there are, and to how many a token goes. 0: the model is dense."""

    count: int = 0
    per_token: int = 0


def features(
    experts: Experts,
    *,
    rows: int = 0,
    verify: int = 0,
    prefill: int = 0,
    context: int = 0,
    propose: int = 0,
    deepest: int = 0,
    prefills: int = 0,
    pairs: float = 0.0,
) -> Features:
    """Of a step of so many decoding rows, tokens to verify, tokens of prompts, tokens of KV read,
    tokens to propose and, of these, most for one row; of prompts, rows, and pairs of a new token
    and one before it."""
    touched = 0.0
    if experts.count:
        touched = experts_touched(rows + verify + prefill, experts.count, experts.per_token)
    verifies = verify > 0
    counts = [1.0, rows, verify, prefill, context / 1000, touched, propose, verifies, deepest]
    return np.array([*counts, prefills, pairs / 1e6])


def features_of(plans: Plans, experts: Experts) -> Features:
    """Of the step that these plans are."""
    rows = verify = prefill = context = propose = deepest = prefills = 0
    pairs = 0.0
    for plan in plans:
        if plan is None:
            continue
        is_prefill = plan.flags & ROW_PREFILL != 0
        new = plan.num_tokens[is_prefill].astype(np.float64)
        prefills += len(new)
        prefill += int(new.sum())
        pairs += float((new * (plan.starts[is_prefill] + new / 2)).sum())
        rows += int(((plan.flags & (ROW_SAMPLE | ROW_PREFILL)) == ROW_SAMPLE).sum())
        verify += int(plan.num_draft.sum())
        propose += int(plan.num_propose.sum())
        deepest = max(deepest, int(plan.num_propose.max(initial=0)))
        context += int(plan.starts.sum() + plan.num_tokens.sum())
    return features(
        experts,
        rows=rows,
        verify=verify,
        prefill=prefill,
        context=context,
        propose=propose,
        deepest=deepest,
        prefills=prefills,
        pairs=pairs,
    )


class StepTimes:
    """Learns from steps that are over: launched -> committed, in order. `model` is for those who
    plan."""

    def __init__(self, experts: Experts) -> None:
        self.model = StepTimeModel()
        self.experts = experts
        self.num_steps = 0  # that were learnt from
        self.predicted_s = self.measured_s = 0.0
        self._flights: deque[tuple[Features | None, float]] = deque()
        self._num_plain = 0
        self._committed_s = 0.0

    def stats(self) -> StepTimeStats:
        """Of the steps that were learnt from."""
        error = self.model.median_relative_error if self.model.num_observed else 0.0
        return StepTimeStats(self.num_steps, self.predicted_s, self.measured_s, error)

    def launched(self, plans: Plans, now_s: float) -> None:
        """These plans run now."""
        self._flights.append((self._to_learn(plans), now_s))

    def committed(self, now_s: float, *, is_typical: bool = True) -> None:
        """The oldest step in flight is over. `is_typical`: others like it will take as long."""
        wanted, launched_s = self._flights.popleft()
        if wanted is not None and is_typical:
            seconds = now_s - max(launched_s, self._committed_s)
            predicted = self.model.predict(wanted)[0]
            if self.model.observe(wanted, seconds):
                self.num_steps += 1
                self.predicted_s += predicted
                self.measured_s += seconds
        self._committed_s = now_s

    def _to_learn(self, plans: Plans) -> Features | None:
        """None: there is nothing to learn from this step."""
        if self.num_steps >= WELL_KNOWN and all(
            plan is None or plan.only_decodes for plan in plans
        ):
            self._num_plain += 1
            if self._num_plain % PLAIN_INTERVAL:
                return None
        return features_of(plans, self.experts)
