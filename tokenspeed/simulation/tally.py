# SPDX-License-Identifier: MIT
"""The figures of a simulated run, added up as requests end. What needs windows of time is measured
from the raw file, as of real runs. Knows outcomes, no machine.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tokenspeed.simulation.simulate import Outcome

FEWEST_TOKENS = 2  # of a stream that has a rate


@dataclass(slots=True)
class Tally:
    """`add` every outcome, then ask."""

    statuses: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0  # of answered requests
    cached_tokens: int = 0
    output_tokens: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # tokens per second behind the first

    def add(self, outcome: Outcome) -> None:
        self.statuses[outcome.status] += 1
        times_s = outcome.token_times_s
        if not times_s:
            return
        self.input_tokens += outcome.session.turns[outcome.number].input_tokens
        self.cached_tokens += outcome.cached_tokens
        self.output_tokens += len(times_s)
        self.ttfts_s.append(times_s[0] - outcome.sent_s)
        if len(times_s) >= FEWEST_TOKENS and times_s[-1] > times_s[0]:
            self.rates.append((len(times_s) - 1) / (times_s[-1] - times_s[0]))

    def figures(self, duration_s: float, num_devices: int = 1) -> dict[str, float]:
        """Of a run that took so long. TTFTs in seconds, TPS over a whole answer (p1: of the slowest
        hundredth)."""
        ttft = _percentiles(self.ttfts_s, (50, 90, 99))
        tps = _percentiles(self.rates, (50, 10, 1))
        minutes = max(duration_s, 1e-9) / 60 * num_devices
        return {
            "requests": sum(self.statuses.values()),
            **{status: self.statuses[status] for status in ("refused", "error", "cancelled")},
            **{f"ttft_p{share}_s": value for share, value in zip((50, 90, 99), ttft, strict=True)},
            **{f"tps_p{share}": value for share, value in zip((50, 10, 1), tps, strict=True)},
            "output_tokens_per_minute_per_device": self.output_tokens / minutes,
            "cached_tokens_per_minute_per_device": self.cached_tokens / minutes,
            "computed_tokens_per_minute_per_device": (self.input_tokens - self.cached_tokens)
            / minutes,
            "hit_rate": self.cached_tokens / max(self.input_tokens, 1),
        }


def _percentiles(values: list[float], shares: tuple[int, ...]) -> list[float]:
    """NaN where there is nothing."""
    if not values:
        return [float("nan")] * len(shares)
    found: list[float] = np.percentile(values, shares).tolist()
    return found
