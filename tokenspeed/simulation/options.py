# SPDX-License-Identifier: MIT
"""Options of a simulated run: the engine's as far as they matter here, and how it is played.

Knows no defaults of devices: what depends on one must be resolved before a run. Flags of the
command line are made from here.
"""

import math
from dataclasses import dataclass, fields

from tokenspeed.config import MAX_TPS_FLOOR, PacingOptions, option


@dataclass(frozen=True)
class SimulationOptions:
    """How a workload is served and played. `ValueError`: a number out of its range."""

    num_pages: int | None = option(None, "pages of KV of each dp group; default: what fits", low=1)
    max_model_len: int | None = option(
        None, "tokens of prompt and answer together; default: what fits", low=1
    )
    page_size: int = option(64, "tokens in a page", "--block-size", low=1)
    max_num_seqs: int = option(64, "requests that run at once", low=1)
    max_num_batched_tokens: int = option(8192, "tokens in one step", low=1)
    max_num_partial_prefills: int = option(4, "prompts prefilled in turns at once", low=1)
    overlap_depth: int = option(0, "steps planned before the last result is known: 0 or 1", low=0)
    enable_prefix_caching: bool = option(True, "reuse the KV of prompts seen before")
    max_queue_len: int = option(1024, "requests that may wait; more are refused", low=1)
    tps_floor: float | None = option(
        None, "tokens per second that each stream is promised; unset: no pacing", low=0
    )
    max_queue_wait_s: float | None = option(
        None, "seconds that a request may wait; what waits longer, or would, is refused", low=0
    )
    retries: int = option(4, "times that a refused turn is sent again, after its wait", low=0)
    acceptance: float | None = option(
        None, "chance of a draft, if those before it are right; default: no drafts", low=0
    )
    acceptance_spread: float = option(0.0, "its standard deviation among requests", low=0)
    draft_depth: int | None = option(None, "drafts of each decoding row", low=1)
    concurrency: int | None = option(
        None, "sessions at once; without it they begin when the workload says", low=1
    )
    time_scale: float = option(1.0, "factor of starts and gaps", low=0)
    duration_s: float | None = option(None, "virtual time after which nothing is sent", low=0)
    forced: bool = option(False, "answers are what the session's next prompt goes on with")
    idle_s: float | None = option(
        None, "drop KV that was idle for so long; default: when others need its place", low=0
    )
    noise: float | None = option(
        None, "standard deviation of a step's relative error; default: the profile's", low=0
    )
    noise_seed: int = option(0, "of that error, and of what is accepted", low=0)
    stretches: bool = option(True, "one call for steps that are alike; no figure depends on it")

    def __post_init__(self) -> None:
        for one in fields(self):
            low, value = one.metadata["low"], getattr(self, one.name)
            if low is None or value is None:
                continue
            number = isinstance(value, int if one.type in (int, int | None) else int | float)
            if isinstance(value, bool) or not number or not low <= value < math.inf:
                raise ValueError(f"{one.name} must be a number of at least {low}: {value!r}")
        if self.overlap_depth > 1:
            raise ValueError(f"overlap_depth must be 0 or 1: {self.overlap_depth}")
        if self.noise is not None and not self.noise < 1:
            raise ValueError(f"noise must be below 1: {self.noise}")
        if self.tps_floor is not None and not 0 < self.tps_floor <= MAX_TPS_FLOOR:
            raise ValueError(f"tps_floor must be in (0, {MAX_TPS_FLOOR}]: {self.tps_floor}")
        self._check_drafts()

    @property
    def pacing(self) -> PacingOptions:
        return PacingOptions(self.tps_floor, self.max_queue_wait_s)

    def _check_drafts(self) -> None:
        mean, spread = self.acceptance, self.acceptance_spread
        if (mean is None) != (self.draft_depth is None):
            raise ValueError("acceptance and draft_depth: give both, or neither")
        if mean is not None and not mean <= 1:
            raise ValueError(f"acceptance must be at most 1: {mean}")
        most = 0.0 if mean is None else mean * (1 - mean)  # of a variance, between 0 and 1
        if spread and not spread * spread < most:
            raise ValueError(f"acceptance_spread: no chances of mean {mean} vary by {spread}")
