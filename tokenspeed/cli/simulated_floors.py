# SPDX-License-Identifier: MIT
"""`Floors`: how well a simulated run kept floors, in the windows by which real runs are judged.

Knows times of tokens; decides nothing.
"""

import math
from collections.abc import Sequence

from tokenspeed.bench.windows import Attainment


class Floors:
    """The attainment of each floor (tokens per second). `ValueError`: one is not finite or not
    above 0."""

    def __init__(self, floors: Sequence[float]) -> None:
        for floor in floors:
            if not 0 < floor < math.inf:
                raise ValueError(f"--floors must be finite and above 0: {floor}")
        self._floors = dict.fromkeys(floors)
        self._kept = Attainment(self._floors)

    def add(self, times_s: Sequence[float]) -> None:
        """One stream's tokens."""
        if self._floors:
            self._kept.add_tokens(times_s)

    def figures(self) -> dict[str, float]:
        """NaN before the first stream."""
        return {f"attainment_of_{floor:g}_tps": self._kept.share(floor) for floor in self._floors}
