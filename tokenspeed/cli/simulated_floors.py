# SPDX-License-Identifier: MIT
"""`Floors`: how well a simulated run kept floors, in the windows by which real runs are judged.

Knows times of tokens; decides nothing.
"""

import math
from collections.abc import Sequence

import numpy as np

from tokenspeed.bench.windows import window_rates


class Floors:
    """Of all seconds that streams ran, the share in windows at or above each floor (tokens per
    second). `ValueError`: a floor is not finite or not above 0."""

    def __init__(self, floors: Sequence[float]) -> None:
        for floor in floors:
            if not 0 < floor < math.inf:
                raise ValueError(f"--floors must be finite and above 0: {floor}")
        self._held_s = dict.fromkeys(floors, 0.0)
        self._whole_s = 0.0

    def add(self, times_s: Sequence[float]) -> None:
        """One stream's tokens. Streams without two moments have no rate."""
        rates = window_rates(times_s, np.ones(len(times_s))) if self._held_s else ()
        if not len(rates):
            return
        seconds = times_s[-1] - times_s[0]
        self._whole_s += seconds
        for floor in self._held_s:
            self._held_s[floor] += seconds * float(np.mean(np.asarray(rates) >= floor))

    def figures(self) -> dict[str, float]:
        """NaN before the first stream."""
        whole_s = self._whole_s or math.nan
        return {f"attainment_of_{f:g}_tps": held_s / whole_s for f, held_s in self._held_s.items()}
