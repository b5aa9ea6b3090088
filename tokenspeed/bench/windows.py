# SPDX-License-Identifier: MIT
"""One-second windows over a stream's tokens: what rate its reader saw, and how often it was enough.
Knows no requests.

     first token                                                     last token
         |-------- window 0: 1 s --------|                                |
         |   |-------- window 1 --------|    0.1 s later                  |
         |                          ...  |------- the last one: ends here |

A window takes in what arrives after its beginning up to its end. The last one ends at the last
token, so no part of a stream is outside; a stream of less than a second is one window.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

WINDOW_US, SLIDE_US = 1_000_000, 100_000

Array = npt.NDArray[np.float64]
Moments = npt.NDArray[np.int64]  # microseconds


def spread(counts: npt.ArrayLike, total: int) -> Array:
    """Tokens of each event; events that do not tell how many bring `total` in equal parts."""
    told = np.asarray(counts, dtype=np.float64)
    events = told.sum()
    return told * (max(total, events) / events) if events else told


def window_rates(times: npt.ArrayLike, counts: npt.ArrayLike) -> Array:
    """Tokens per second of each window of one stream; none if it has no two moments.

    `times`: when events arrived, seconds, [num_events], ascending; `counts`: their tokens.
    """
    at = microseconds(times)
    if at.size < 2 or at[-1] == at[0]:
        return np.empty(0)
    at -= at[0]
    length = int(min(at[-1], WINDOW_US))
    last = int(at[-1]) - length
    starts = np.arange(0, last + 1, SLIDE_US)
    if starts[-1] != last:
        starts = np.append(starts, last)
    return tokens_between(at, counts, starts, starts + length) * (1e6 / length)


def microseconds(seconds: npt.ArrayLike) -> Moments:
    """Whole ones: a token on a window's edge is on it, not near it."""
    return np.rint(np.asarray(seconds, dtype=np.float64) * 1e6).astype(np.int64)


def tokens_between(at: Moments, counts: npt.ArrayLike, after: Moments, until: Moments) -> Array:
    """Tokens in each of some windows, [num_windows]: those that arrived after its beginning and
    until its end. `at`: when events arrived, [num_events], ascending; `counts`: their tokens."""
    so_far = np.concatenate([[0.0], np.cumsum(np.asarray(counts, dtype=np.float64))])
    arrived = so_far[np.searchsorted(at, until, side="right")]
    before = so_far[np.searchsorted(at, after, side="right")]
    return np.asarray(arrived - before, dtype=np.float64)


class Attainment:
    """Of all seconds that streams ran, the share spent in windows at or above each of `floors`."""

    def __init__(self, floors: Iterable[float]) -> None:
        self._held_s = dict.fromkeys(floors, 0.0)
        self._whole_s = 0.0

    def add(self, rates: Array, seconds: float) -> None:
        """A stream of so many seconds and of these windows, at least one."""
        self._whole_s += seconds
        for floor in self._held_s:
            self._held_s[floor] += seconds * float(np.mean(rates >= floor))

    def add_tokens(self, times: npt.ArrayLike) -> None:
        """A stream of single tokens, by the seconds at which they came. One without two moments has
        no rate, and is left out."""
        at = np.asarray(times, dtype=np.float64)
        if (rates := window_rates(at, np.ones(len(at)))).size:
            self.add(rates, float(at[-1] - at[0]))

    def share(self, floor: float) -> float:
        """NaN before the first stream."""
        return self._held_s[floor] / self._whole_s if self._whole_s else math.nan


def worst_rate(rates: Array) -> float:
    """The rate that 99% of a stream's windows are at or above (numpy's linear method)."""
    return float(np.percentile(rates, 1))


def weighted_percentile(values: Array, weights: Array, percent: float) -> float:
    """The least value at or below which `percent` of the weight lies."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    place = int(np.searchsorted(reached, reached[-1] * percent / 100 * (1 - 1e-12)))
    return float(values[order[place]])
