# SPDX-License-Identifier: MIT
"""How long a step takes on some device: what a profile is, and the one that was measured.

Knows counts of tokens, no requests; draws nothing at random.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import FEATURES, experts_touched
from tokenspeed.engine.step_times import Experts
from tokenspeed.execution.plan_view import ROW_PREFILL, ROW_SAMPLE, PlanView


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one scheduler's plan asks of its device. Prefill rows stand one by one."""

    decode_rows: int
    decode_context: int  # tokens that decoding rows read, their own included
    prefill_starts: NDArray[np.int32]
    prefill_counts: NDArray[np.int32]
    sampled_rows: int
    verify_tokens: int = 0  # drafts of the decoding rows, whose context they are part of

    @property
    def prefill_tokens(self) -> int:
        return int(self.prefill_counts.sum())

    @property
    def only_decodes(self) -> bool:
        return len(self.prefill_counts) == 0

    def later(self, steps: int) -> "StepShape":
        """The same decoding rows so many tokens later."""
        return replace(self, decode_context=self.decode_context + steps * self.decode_rows)


NO_ROWS = np.empty(0, np.int32)
NOTHING = StepShape(0, 0, NO_ROWS, NO_ROWS, 0)


def shape_of(plan: PlanView, *, verifies: bool = False) -> StepShape:
    """Of a plan. `verifies`: with its drafts, which are left out otherwise."""
    ends, drafts = plan.starts + plan.num_tokens, 0
    if verifies:
        drafts = int(plan.num_draft.sum())
    else:
        ends = ends - plan.num_draft
    sampled = int(np.count_nonzero(plan.flags & ROW_SAMPLE))
    is_prefill = plan.flags & ROW_PREFILL != 0
    if not is_prefill.any():
        return StepShape(plan.num_rows, int(ends.sum()), NO_ROWS, NO_ROWS, sampled, drafts)
    starts, counts = plan.starts[is_prefill], plan.num_tokens[is_prefill]
    rows = plan.num_rows - len(starts)
    return StepShape(rows, int(ends[~is_prefill].sum()), starts, counts, sampled, drafts)


class DeviceProfile(Protocol):
    """Seconds of steps. One shape for each scheduler of the engine."""

    @property
    def name(self) -> str: ...
    @property
    def host_s(self) -> float:
        """Of a step, spent on the host while the device waits, unless steps overlap."""

    @property
    def request_s(self) -> float:
        """From a request's sending until the scheduler knows it."""

    @property
    def noise(self) -> float:
        """Standard deviation of a step's relative error."""

    @property
    def experts(self) -> Experts: ...

    def step_s(self, shapes: Sequence[StepShape]) -> float:
        """Of one step on the device."""

    def growth_s(self, shapes: Sequence[StepShape]) -> float:
        """By which the same decoding rows take longer a token later."""


# What a step with prompts costs beside `FEATURES`: that it has any, which no captured step has;
# thousands of tokens that their rows read.
PREFILL_FEATURES = ("prefill_step", "prefill_read_thousands")


@dataclass(frozen=True)
class LinearProfile:
    """Seconds as a sum of coefficient x feature: those of `_policy.StepTimeModel`, and
    `PREFILL_FEATURES`.

    `ValueError`: a coefficient of no known feature, or one that is negative or not finite, or a
    step that takes no time.
    """

    name: str
    coefficients: dict[str, float]  # seconds for one of each
    num_experts: int = 0  # of a layer; 0: a dense model
    experts_per_token: int = 0
    host_s: float = 0.0
    request_s: float = 0.0
    noise: float = 0.0  # standard deviation of a step's relative error
    machine: dict[str, Any] = field(default_factory=dict)  # where it was measured, and with what

    def __post_init__(self) -> None:
        unknown = sorted(self.coefficients.keys() - {*FEATURES, *PREFILL_FEATURES})
        if unknown:
            raise ValueError(f"profile {self.name}: no feature {', '.join(unknown)}")
        numbers = [*self.coefficients.values(), self.host_s, self.request_s, self.noise]
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError(f"profile {self.name}: numbers must be finite and not negative")
        if not self.coefficients.get("step", 0) > 0:
            raise ValueError(f"profile {self.name}: a step takes no time: coefficient `step` is 0")
        if not 0 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"profile {self.name}: more experts_per_token than num_experts")

    @property
    def experts(self) -> Experts:
        return Experts(self.num_experts, self.experts_per_token)

    def check_drafts(self) -> None:
        """`ValueError`: it does not say what drafts cost."""
        if "verify_tokens" not in self.coefficients:
            raise ValueError(f"profile {self.name}: drafts need a coefficient `verify_tokens`")

    def step_s(self, shapes: Sequence[StepShape]) -> float:
        tell = self.coefficients.get
        return sum(tell(name, 0.0) * amount for name, amount in self.amounts(shapes).items())

    def amounts(self, shapes: Sequence[StepShape]) -> dict[str, float]:
        """How much of each feature a step has; what is missing is 0."""
        rows = sum(shape.decode_rows for shape in shapes)
        context = sum(shape.decode_context for shape in shapes)
        found = {"step": 1.0, "decode_rows": float(rows), "context_thousands": context / 1000}
        prefill, verify = 0, sum(shape.verify_tokens for shape in shapes)
        if verify:
            found |= {"verify_tokens": float(verify), "verifies": 1.0}
        for shape in shapes:
            if not shape.only_decodes:
                prefill += shape.prefill_tokens
                _add_prefill(found, shape.prefill_starts, shape.prefill_counts)
        if self.num_experts:
            touched = experts_touched(
                rows + verify + prefill, self.num_experts, self.experts_per_token
            )
            found["experts"] = touched
        return found

    def growth_s(self, shapes: Sequence[StepShape]) -> float:
        rows = sum(shape.decode_rows for shape in shapes)
        return self.coefficients.get("context_thousands", 0.0) * rows / 1000


def _add_prefill(
    found: dict[str, float], starts: NDArray[np.int32], counts: NDArray[np.int32]
) -> None:
    """The features of prompts' rows, on top of what is there."""
    new = counts.astype(np.float64)
    read = float((starts + new).sum()) / 1000
    pairs = float((new * (starts + new / 2)).sum()) / 1e6
    values = {"prefills": float(len(new)), "prefill_tokens": float(new.sum())}
    values |= {"context_thousands": read, "prefill_read_thousands": read}
    values["prefill_context_millions"] = pairs
    for name, value in values.items():
        found[name] = found.get(name, 0.0) + value
    found["prefill_step"] = 1.0


def read_profile(path: Path) -> LinearProfile:
    """A profile that was measured and written as JSON. `ValueError`: it is none."""
    try:
        return LinearProfile(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
