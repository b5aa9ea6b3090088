# SPDX-License-Identifier: MIT
"""A run's records as what a picture shows: lines over time, and first tokens by uncached length.

Draws nothing and judges nothing: what a floor means stands in `measure.py`.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tokenspeed.bench.plots import Cloud, Timeline
from tokenspeed.bench.records import RequestRecord, Run
from tokenspeed.bench.windows import (
    SLIDE_US,
    WINDOW_US,
    Array,
    Moments,
    microseconds,
    spread,
    tokens_between,
)

MOST_POINTS = 600


def timeline_of(run: Run) -> Timeline:
    """The run in windows of one second that end at each of at most `MOST_POINTS` moments.

    A stream's speed is known where a whole window lies between its first and its last token; a
    stream of less than a second has one speed over all of its time.
    """
    records = run.records
    end = max([run.duration_s, *(record.end_s for record in records)])
    step = max(SLIDE_US / 1e6, end / MOST_POINTS)
    moments = microseconds(np.arange(0.0, end + step / 2, step))
    time = moments / 1e6
    last = [record.token_times[-1] if record.token_times else None for record in records]
    streams = [
        (record.first_token_s, over)
        for record, over in zip(records, last, strict=True)
        if record.first_token_s is not None and over is not None
    ]
    waits = [
        (record.sent_s, record.end_s if record.first_token_s is None else record.first_token_s)
        for record in records
    ]
    lowest, median = _speeds(records, moments)
    return Timeline(
        time_s=time.tolist(),
        running=_under_way(streams, time).tolist(),
        waiting=_under_way(waits, time).tolist(),
        tokens_per_s=_all_tokens(records, moments).tolist(),
        lowest_tps=lowest.tolist(),
        median_tps=median.tolist(),
        refused_s=[each.end_s for each in records if each.status in ("refused", "error")],
    )


def cloud_of(run: Run) -> Cloud:
    """Tokens that the endpoint computed before its first one, and how long that took; where both
    are known."""
    seen = [
        (computed, ttft)
        for record in run.records
        if (ttft := record.ttft_s) is not None and ttft > 0 and record.input_tokens > 0
        if (computed := record.computed_tokens) is not None
    ]
    tokens, seconds = zip(*seen, strict=True) if seen else ((), ())
    return Cloud(run.endpoint, tuple(tokens), tuple(seconds))


def _under_way(spans: list[tuple[float, float]], time: Array) -> Array:
    """How many spans have begun and not ended at each moment."""
    begun = np.sort([begin for begin, _ in spans])
    ended = np.sort([end for _, end in spans])
    started = np.searchsorted(begun, time, side="right")
    return (started - np.searchsorted(ended, time, side="right")).astype(np.float64)


def _all_tokens(records: list[RequestRecord], moments: Moments) -> Array:
    """Tokens of every stream in the window that ends at each moment, per second."""
    if not (events := [microseconds(record.token_times) for record in records]):
        return np.zeros(len(moments))
    at = np.concatenate(events)
    counts = np.concatenate(
        [spread(record.token_counts, record.output_tokens) for record in records]
    )
    order = np.argsort(at, kind="stable")
    found = tokens_between(at[order], counts[order], moments - WINDOW_US, moments)
    return found * (1e6 / WINDOW_US)


def _speeds(records: list[RequestRecord], moments: Moments) -> tuple[Array, Array]:
    """The slowest and the median stream's tokens per second at each moment; NaN without one."""
    parts = [part for record in records for part in _speed(record, moments)]
    lowest, median = np.full(len(moments), np.nan), np.full(len(moments), np.nan)
    if parts:
        places = np.concatenate([place for place, _ in parts])
        rates = np.concatenate([rate for _, rate in parts])
        order = np.argsort(places, kind="stable")
        found, starts = np.unique(places[order], return_index=True)
        for place, group in zip(found, np.split(rates[order], starts[1:]), strict=True):
            lowest[place], median[place] = group.min(), np.median(group)
    return lowest, median


def _speed(record: RequestRecord, moments: Moments) -> Iterator[tuple[npt.NDArray[np.intp], Array]]:
    at = microseconds(record.token_times)
    if len(at) < 2 or at[-1] <= at[0]:
        return
    counts = spread(record.token_counts, record.output_tokens)
    length = int(min(at[-1] - at[0], WINDOW_US))
    first = at[0] + (WINDOW_US if length == WINDOW_US else 0)
    places = np.flatnonzero((moments >= first) & (moments <= at[-1]))
    ends = moments[places] if length == WINDOW_US else np.full(len(places), at[-1])
    if len(places):
        yield places, tokens_between(at, counts, ends - length, ends) * (1e6 / length)
