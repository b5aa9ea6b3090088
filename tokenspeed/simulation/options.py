# SPDX-License-Identifier: MIT
"""Options of a simulated run: the engine's as far as they matter here, and how it is played.

Knows no defaults of devices: what depends on one must be resolved before a run. Flags of the
command line are made from here.
"""

import math
from dataclasses import dataclass, fields

from tokenspeed.config import option


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
    noise_seed: int = option(0, "of that error", low=0)
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
