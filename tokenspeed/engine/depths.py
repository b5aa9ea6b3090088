# SPDX-License-Identifier: MIT
"""`Depths`: how deep each draft should be, learnt from steps and from what was sampled.

Brings plans and drafts into the arrays that `_policy` learns from. Knows no tokens; times are told.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import Acceptance, DepthPolicy
from tokenspeed.engine.step_times import StepTimes, features

# Of these requests: the tokens per second that each must have, and the most that any other must.
LeastRates = Callable[[NDArray[np.uint64]], tuple[NDArray[np.float64], float]]


NO_RIVAL = (0, 0, 0)


@dataclass(slots=True)
class _Entries:
    """Drafts, one entry each: of which request, by whom, how well and how long."""

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
class Offers(_Entries):
    """Drafts in hand, and drafts that may be proposed."""

    proposes: list[bool] = field(default_factory=list)
    rivals: list[tuple[int, int, int]] = field(default_factory=list)  # see `Depths.choose`

    def have(self, request_id: int, drafter: int, match_len: int, length: int) -> None:
        """In hand."""
        self.add(request_id, drafter, match_len, length)
        self.proposes.append(False)
        self.rivals.append(NO_RIVAL)

    def propose(
        self, request_id: int, drafter: int, length: int, rival: tuple[int, int, int] = NO_RIVAL
    ) -> None:
        """By a drafter with weights, at a cost."""
        self.add(request_id, drafter, 0, length)
        self.proposes.append(True)
        self.rivals.append(rival)


@dataclass(slots=True)
class Findings(_Entries):
    """What came of drafts: `lengths` leading tokens were sampled, and the next one was not."""

    missed: list[bool] = field(default_factory=list)


class Depths:
    """Learns acceptance, and chooses by it and by step times. One per engine."""

    def __init__(
        self,
        num_drafters: int,
        max_drafts: int,
        times: StepTimes,
        least_rates: LeastRates | None = None,
    ) -> None:
        """`least_rates`: None where nobody has a floor."""
        self.findings = Findings()
        self.times = times
        self._acceptance = Acceptance(num_drafters)
        self._policy = DepthPolicy(
            times.model,
            self._acceptance,
            num_experts=times.experts.count,
            experts_per_token=times.experts.per_token,
        )
        self._max_drafts, self._least_rates = max_drafts, least_rates

    def better(self, request_id: int, one: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether the first token of the `one` draft (drafter, match_len) is as likely as the
        other's."""
        rate = self._acceptance.rate
        return rate(request_id, *one, 0) >= rate(request_id, *other, 0)

    def choose(self, offers: Offers, num_rows: int, num_context: int) -> list[int]:
        """How much of each offer to take, in a step of `num_rows` decoding rows over `num_context`
        tokens. A request's offers stand together. A rival is (drafter, match_len, length) of what
        is found without proposing: proposals are worth what they are likelier to be right."""
        base = features(self.times.experts, rows=num_rows, context=num_context)
        request_ids = np.array(offers.request_ids, np.uint64)
        floors, floor_of_others = None, 0.0
        if self._least_rates is not None:
            floors, floor_of_others = self._least_rates(request_ids)
        chosen: list[int] = self._policy.choose(
            base,
            request_ids,
            np.array(offers.drafters, np.int32),
            np.array(offers.match_lens, np.int32),
            np.array(offers.lengths, np.int32),
            np.array(offers.proposes, np.bool_),
            max(0, self._max_drafts - num_rows),
            rivals=np.array(offers.rivals, np.int32).reshape(-1, 3),
            floors=floors,
            floor_of_others=floor_of_others,
        ).tolist()
        return chosen

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
