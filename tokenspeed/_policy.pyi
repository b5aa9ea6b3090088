# SPDX-License-Identifier: MIT
"""What is worth doing, learnt while running, compiled from csrc/policy: how long steps take, how
often drafts are accepted, how deep to speculate. Knows no tokens and no clock; nothing is random.

Arrays are contiguous and of the named type: nothing is converted. `ValueError` for what does not
fit.
"""

import numpy as np
from numpy.typing import NDArray

# What a step's time is made of, in this order: 1; rows that sample and are no prefill; drafts to
# verify; prefill tokens; tokens of KV read / 1000; distinct experts touched (`experts_touched`);
# tokens that a drafter with weights proposes; whether any row verifies; most tokens proposed for a
# row; rows that are prefill; their pairs of a new token and one before it / 1e6, tokens x (start +
# tokens / 2) each. F of them.
FEATURES: tuple[str, ...]
MAX_DEPTH: int  # of a row; deeper limits mean this one

class StepTimeModel:
    """seconds = sum(coefficients * features), coefficients >= 0.

    Recursive least squares with directional forgetting (Cao and Schwartz, Automatica 36, 2000) and
    Huber's weights, on relative errors.
    """

    def __init__(
        self,
        prior: NDArray[np.float64] | None = None,  # [F] seconds for one of each; 0: free for ever
        *,
        forgetting: float = 0.92,
        prior_weight: float = 1e-4,  # steps that the prior counts for
    ) -> None: ...
    def observe(self, features: NDArray[np.float64], seconds: float) -> bool:
        """Learns from a step. False, and nothing learnt, if a number is not finite, a feature is
        < 0 or the time is not > 0."""
    def predict(self, features: NDArray[np.float64]) -> tuple[float, float]:
        """Seconds and their standard deviation, the noise of steps included."""
    @property
    def coefficients(self) -> NDArray[np.float64]: ...  # [F] seconds for one of each
    @property
    def relative_error(self) -> float: ...  # median of |error| / predicted time, of the last 32
    @property
    def median_relative_error(self) -> float: ...  # ... 256; 1 before the first
    @property
    def num_observed(self) -> int: ...

class Acceptance:
    """How often drafts are what is sampled: for each request, drafter and place."""

    def __init__(
        self,
        num_drafters: int,
        *,
        prior: float = 0.5,
        request_memory: float = 16.0,  # drafts, of a place, that a request's rates remember
        shared_memory: float = 1024.0,  # ... that the drafter's do
        shared_shrinkage: float = 4.0,  # drafts that a place's predecessor counts for
    ) -> None: ...
    def observe(
        self,
        request_ids: NDArray[np.uint64],  # [n]
        drafters: NDArray[np.int32],  # [n] in [0, num_drafters)
        match_lens: NDArray[np.int32],  # [n] as when the depth was chosen; 0: matches nothing
        hits: NDArray[np.int32],  # [n] leading drafts that are what was sampled
        missed: NDArray[np.bool_],  # [n] the next draft is not; False: there was none
    ) -> None:
        """Also of drafts that no step carried: a token drafter's are compared with what was sampled
        anyway, and nothing needs to be tried. Of a request that `choose` has not seen, or that was
        forgotten, the drafter alone learns."""
    def rate(self, request_id: int, drafter: int, match_len: int, place: int) -> float:
        """That draft `place` (from 0) is accepted if those before it are."""
    def forget(self, request_id: int) -> None: ...
    @property
    def num_requests(self) -> int: ...

class DepthPolicy:
    """Depths that give most tokens per second by what is believed, and rarely others, to learn:
    0.8% of the time is spent on these."""

    def __init__(
        self,
        times: StepTimeModel,
        acceptance: Acceptance,
        *,
        num_experts: int = 0,  # of a layer; 0: a dense model
        experts_per_token: int = 0,
    ) -> None: ...
    def choose(
        self,
        base: NDArray[np.float64],  # [F] the coming step without these drafts
        request_ids: NDArray[np.uint64],  # [n]
        drafters: NDArray[np.int32],  # [n]
        match_lens: NDArray[np.int32],  # [n] tokens that matched; 0 for drafters with weights
        max_depths: NDArray[np.int32],  # [n] drafts in hand, or that may be proposed
        proposes: NDArray[np.bool_],  # [n] which of the two
        max_drafts: int,  # in all
        *,
        rivals: NDArray[np.int32] | None = None,  # [n, 3] drafter, match_len, depth; None: none
        floors: NDArray[np.float64] | None = None,  # [n] tokens per second; None: none
        floor_of_others: float = 0.0,  # the highest of other streams in the step
    ) -> NDArray[np.int32]:
        """[n] depths. What a drafter with weights proposes in this step is verified in the next:
        it is worth what it is likelier to be right than its rival, the draft that tokens alone give
        (a depth of 0: none); its verification is paid here too. Floors are those of the rows'
        streams: they are held where they can be. A request's rows stand together."""

class Pacing:
    """Keeps streams at their floors (csrc/policy/pacing.h); `Scheduler.pace` takes it."""

    def __init__(
        self,
        times: StepTimeModel,
        *,
        tps_floor: float | None = None,  # of the default class, in (0, 10000]; None: none
        max_wait_s: float | None = None,  # before a request's first step; None: for ever
        max_num_seqs: int,
        num_experts: int = 0,
        experts_per_token: int = 0,
    ) -> None: ...
    def predicted_wait_s(self, request_id: int) -> float:
        """Until a waiting request runs, if streams last as long as they did lately and prompts
        before it are computed as fast: 0 if it may run at once, 1 where nothing has ended yet. 0
        for those that run and unknown ones. O(waiting + running)."""
    def hopeless(self, request_id: int) -> bool:
        """Whether its wait, one and a half times what is predicted, is longer than it may be."""
    def retry_after_s(self, request_id: int) -> float:
        """When it may be asked again with better luck; at least 1."""
    def overdue(self) -> list[int]:
        """Requests that have waited for their first step longer than they may."""
    def least_rates(self, request_ids: NDArray[np.uint64]) -> tuple[NDArray[np.float64], float]:
        """[n] tokens per second that each must have for its floor, 0 for none; and the most that
        any other stream must have that decodes."""
    def streams(self) -> list[tuple[int, float, int, float, bool]]:
        """By request: its number, its floor (0: none), tokens so far, seconds until the next one is
        due (0 without a floor or before the first), whether it runs."""
    @property
    def budget_s(self) -> float: ...  # of the step planned last; infinite: nothing is due
    @property
    def num_behind(self) -> int: ...  # streams that had less than their floor in the last second
    @property
    def num_forced(self) -> int: ...  # chunks of prompts that were taken though they do not fit
    @property
    def num_late(self) -> int: ...  # outputs that came after they were due
    @property
    def num_unmeetable(self) -> int: ...  # requests whose floor was given up: not even alone
    @property
    def last_unmeetable(self) -> float: ...  # such a floor; 0: there was none

def choose_depths(
    times: StepTimeModel,
    base: NDArray[np.float64],  # [F]
    rates: NDArray[np.float64],  # [n, d] of each draft, if those before it are accepted
    max_depths: NDArray[np.int32],  # [n]
    proposes: NDArray[np.bool_],  # [n]
    max_drafts: int,
    *,
    num_experts: int = 0,
    experts_per_token: int = 0,
    floors: NDArray[np.float64] | None = None,  # [n] tokens per second; None: none
    floor_of_others: float = 0.0,  # the highest of streams that have no row here
) -> NDArray[np.int32]:
    """[n] depths that maximise (decode rows + expected accepted drafts) / seconds of the step
    without its prefill, exactly (Dinkelbach, Management Science 13, 1967), if each row has its
    floor by them; else, nearly, of the depths by which it has, or as much of it as can be."""

def experts_touched(num_tokens: float, num_experts: int, experts_per_token: int) -> float:
    """Distinct experts of a layer, if every token chose at random."""
