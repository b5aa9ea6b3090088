# SPDX-License-Identifier: MIT
"""`Drafts`: how many drafts of a request come true, drawn by a seed. Knows no tokens and no times.

A draft is right with its request's chance if those before it are; the chances of requests are one
number, or vary around it as a Beta distribution does.
"""

import numpy as np
from numpy.typing import NDArray


class Drafts:
    """`depth` drafts for each decoding row. `num_given` and `num_accepted` count them.

    `spread`: standard deviation of requests' chances. REQUIRES: spread^2 < mean (1 - mean), or 0.
    """

    def __init__(self, mean: float, *, spread: float, depth: int, seed: int) -> None:
        self.depth = depth
        self.num_given = self.num_accepted = 0
        self._mean, self._spread, self._seed = mean, spread, seed
        self._draws = np.random.default_rng([seed, 0])

    def chance(self, request_id: int) -> float:
        """Of this request, whenever it is asked."""
        if not self._spread:
            return self._mean
        weight = self._mean * (1 - self._mean) / self._spread**2 - 1
        draws = np.random.default_rng([self._seed, 1, request_id])
        return float(draws.beta(self._mean * weight, (1 - self._mean) * weight))

    def accepted(
        self, chances: NDArray[np.float64], num_draft: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """[n] of so many drafts of rows with these chances."""
        right = self._draws.random((len(chances), self.depth)) < chances[:, None]
        accepted = np.minimum(right.cumprod(axis=1).sum(axis=1), num_draft)
        self.num_given += int(num_draft.sum())
        self.num_accepted += int(accepted.sum())
        return np.asarray(accepted, np.int32)
