# SPDX-License-Identifier: MIT
"""Distributions to draw lengths and times from. Knows nothing of what is drawn."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Sampler(Protocol):
    def draw(self, rng: np.random.Generator) -> float: ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """`mu` and `sigma` are of the natural logarithm; what is drawn is clipped."""

    mu: float
    sigma: float
    least: float
    most: float

    def draw(self, rng: np.random.Generator) -> float:
        return float(min(max(rng.lognormal(self.mu, self.sigma), self.least), self.most))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Values and the shares at or below them, from 0 to 1; log-linear between two of them."""

    shares: tuple[float, ...]
    values: tuple[float, ...]

    def draw(self, rng: np.random.Generator) -> float:
        return self.at(rng.random())

    def at(self, share: float) -> float:
        return math.exp(np.interp(share, self.shares, np.log(self.values)))


@dataclass(frozen=True, slots=True)
class Mixture:
    """(probability, sampler), the probabilities in all 1."""

    parts: tuple[tuple[float, Sampler], ...]

    def draw(self, rng: np.random.Generator) -> float:
        left = rng.random()
        for share, sampler in self.parts:
            left -= share
            if left < 0:
                return sampler.draw(rng)
        return self.parts[-1][1].draw(rng)


@dataclass(frozen=True, slots=True)
class Counts:
    """1, 2, ... with the probabilities `first`; the rest of the time what `tail` draws, rounded."""

    first: tuple[float, ...]
    tail: Sampler

    def draw(self, rng: np.random.Generator) -> float:
        left = rng.random()
        for value, share in enumerate(self.first, 1):
            left -= share
            if left < 0:
                return float(value)
        return float(max(len(self.first) + 1, round(self.tail.draw(rng))))
