# SPDX-License-Identifier: MIT
"""`Sequence`: what execution must know of a live request. Knows ids, no slots and no pages."""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tokenspeed.execution.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and how its next ones are chosen.

    `output_ids` grows at each commit. When the request is bound to a slot again (it had been
    retracted), sampler state is rebuilt from these tokens alone.
    """

    prompt_ids: NDArray[np.int32]
    params: SamplingParams
    stop_ids: list[int]
    seed: int  # the request's own, or one drawn for it; noise is a function of (seed, position)
    output_ids: list[int] = field(default_factory=list)
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None  # when a step first took it up

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)
