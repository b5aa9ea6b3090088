# SPDX-License-Identifier: MIT
"""`StepTimes`: one engine's model of how long its steps take, and how well it foretells them.

Brings plans into the features that `_policy.StepTimeModel` learns from. Knows no clock and decides
nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import StepTimeModel, experts_touched
from tokenspeed.engine.depths import Experts
from tokenspeed.execution.plan_view import ROW_PREFILL, ROW_SAMPLE, PlanView

Features = NDArray[np.float64]


def features_of(plans: Sequence[PlanView], experts: Experts) -> Features:
    """[F] of the step that these plans are, in the order of `_policy.FEATURES`."""
    rows = verify = prefill = context = propose = deepest = 0
    for plan in plans:
        is_prefill = plan.flags & ROW_PREFILL != 0
        prefill += int(plan.num_tokens[is_prefill].sum())
        rows += int(((plan.flags & (ROW_SAMPLE | ROW_PREFILL)) == ROW_SAMPLE).sum())
        verify += int(plan.num_draft.sum())
        propose += int(plan.num_propose.sum())
        deepest = max(deepest, int(plan.num_propose.max(initial=0)))
        context += int(plan.starts.sum() + plan.num_tokens.sum())
    touched = 0.0
    if experts.count:
        touched = experts_touched(rows + verify + prefill, experts.count, experts.per_token)
    verifies = verify > 0
    counts = [1.0, rows, verify, prefill, context / 1000, touched, propose, verifies, deepest]
    return np.array(counts)


class StepTimes:
    """Learns from steps that are over; `model` is for those who plan."""

    def __init__(self, experts: Experts) -> None:
        self.model = StepTimeModel()
        self.experts = experts
        self.num_steps = 0
        self.predicted_s = self.measured_s = 0.0

    @property
    def error(self) -> float:
        """Median relative error of the latest predictions; 0 before the first."""
        return self.model.median_relative_error if self.model.num_observed else 0.0

    def observe(self, features: Features, seconds: float) -> None:
        """A step with these features took so long."""
        predicted = self.model.predict(features)[0]
        if self.model.observe(features, seconds):
            self.num_steps += 1
            self.predicted_s += predicted
            self.measured_s += seconds
