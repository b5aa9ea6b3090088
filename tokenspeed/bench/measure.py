# SPDX-License-Identifier: MIT
"""`summary`: what a run's records amount to. Knows times and counts; no endpoint and no picture.

    floor attainment   of all seconds that streams ran, the share spent in windows at or above it
    goodput at floor F streams that did not break and were at or above F in 99% of their windows;
                       a client that hangs up breaks nothing
    tokens per minute  of every request that got a token, whether or not it ended well; times to
                       first tokens too. A stream that ended before its endpoint told what of the
                       prompt was cached has an answer in them and no prompt

Windows are those of `bench.windows`; percentiles are numpy's linear ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokenspeed.bench.records import RequestRecord, Run
from tokenspeed.bench.turns import Turns, turns_of
from tokenspeed.bench.windows import (
    Array,
    Attainment,
    spread,
    weighted_percentile,
    window_rates,
    worst_rate,
)

# Uncached tokens from which each class of prompts begins.
UNCACHED_EDGES = (0, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class Price:
    """Currency units for a million tokens of each kind, and for an hour of one device."""

    computed_input: float = 0.0
    cached_input: float = 0.0
    output: float = 0.0
    device_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` values; what is slow is at the top."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second; what is slow is at the bottom."""

    p50: float
    p10: float
    p1: float
    least: float


@dataclass(frozen=True, slots=True)
class TtftClass:
    """Seconds to the first token of prompts with uncached tokens in [`least`, `below`)."""

    least: int
    below: int | None
    ttft_s: Percentiles


@dataclass(frozen=True, slots=True)
class FloorResult:
    """How a floor was kept. `held_users`: held streams that ran at once, on average."""

    floor: float
    attainment: float
    num_streams: int
    held_streams: int
    held_users: float


@dataclass(frozen=True, slots=True)
class Refusals:
    """`answer_s`: how long a refused request waited for that answer. `with_retry_after`: how
    many were told when to come again."""

    count: int
    share: float
    answer_s: Percentiles | None
    with_retry_after: int
    retry_after_s: Percentiles | None


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers; None where there is nothing to measure. Times in seconds.

    `inter_token_s`: each token's share of the wait for its event; `event_gap_s`: the waits
    themselves. `stream_tps`: streams' means; `window_tps`: their windows, weighted by time. Tokens
    per minute are for each device. `untold_input_tokens` are prompts of `untold_requests` whose
    cached part nobody knows: they are in no other figure.
    """

    endpoint: str
    model: str
    workload: str
    dialect: str
    concurrency: int | None
    rate: float | None
    duration_s: float
    devices: int
    died: str | None
    num_sessions: int
    num_requests: int
    statuses: dict[str, int]
    turns: Turns
    ttft_s: Percentiles | None
    ttft_by_uncached: tuple[TtftClass, ...]
    inter_token_s: Percentiles | None
    event_gap_s: Percentiles | None
    latency_s: Percentiles | None
    stream_tps: Rates | None
    window_tps: Rates | None
    floors: tuple[FloorResult, ...]
    output_tokens: int
    cached_input_tokens: int
    computed_input_tokens: int
    untold_input_tokens: int
    untold_requests: int
    output_tokens_per_minute: float
    cached_input_per_minute: float
    computed_input_per_minute: float
    total_tokens_per_minute: float
    hit_rate: float | None
    cost_per_session: float | None
    refusals: Refusals

    def to_json(self) -> dict[str, Any]:
        """Objects, lists and numbers that `json` can write."""
        return asdict(self)


def summary(
    run: Run, floors: Sequence[float] = (), price: Price | None = None, devices: int = 1
) -> Summary:
    """Measures a run. `floors` are in tokens per second, each finite and positive.

    Raises `ValueError` for a floor that is not, and for fewer devices than one.
    """
    for floor in floors:
        if not 0 < floor < float("inf"):
            raise ValueError(f"floors: must be finite and positive, got {floor}")
    if devices < 1:
        raise ValueError(f"devices: must be at least 1, got {devices}")
    records = run.records
    served = [record for record in records if record.output_tokens]  # not all have a text
    ended = [record for record in records if record.status == "ok"]
    streams = [one for one in map(_stream_of, served) if one is not None]
    seconds = run.duration_s or max((record.end_s for record in records), default=0.0)
    output = sum(record.output_tokens for record in served)
    told = [record for record in served if record.computed_tokens is not None]
    cached = sum(record.cached_tokens or 0 for record in told)
    computed = sum(record.computed_tokens or 0 for record in told)
    per_minute = 60 / seconds / devices if seconds > 0 else 0.0
    return Summary(
        endpoint=run.endpoint,
        model=run.model,
        workload=run.workload,
        dialect=run.dialect,
        concurrency=run.concurrency,
        rate=run.rate,
        duration_s=seconds,
        devices=devices,
        died=run.died,
        num_sessions=len({record.session_id for record in records}),
        num_requests=len(records),
        statuses=_statuses(records),
        turns=turns_of(run),
        ttft_s=_percentiles(_ttfts(records)),
        ttft_by_uncached=_ttft_classes(records),
        inter_token_s=_percentiles(_joined(one.inter_token_s for one in streams)),
        event_gap_s=_percentiles(_joined(one.gaps_s for one in streams)),
        latency_s=_percentiles([record.end_s - record.sent_s for record in ended]),
        stream_tps=_stream_tps(streams),
        window_tps=_window_tps(streams),
        floors=tuple(_floor(floor, streams, seconds) for floor in floors),
        output_tokens=output,
        cached_input_tokens=cached,
        computed_input_tokens=computed,
        untold_input_tokens=sum(one.input_tokens for one in served) - cached - computed,
        untold_requests=len(served) - len(told),
        output_tokens_per_minute=output * per_minute,
        cached_input_per_minute=cached * per_minute,
        computed_input_per_minute=computed * per_minute,
        total_tokens_per_minute=(output + cached + computed) * per_minute,
        hit_rate=_hit_rate(served),
        cost_per_session=_cost(price, (computed, cached, output), seconds * devices, served),
        refusals=_refusals(records),
    )


@dataclass(frozen=True, slots=True)
class _Stream:
    """A record's events as rates. Its clock begins with its first event, whose tokens are thus
    before it."""

    gaps_s: Array  # [num_events - 1]
    inter_token_s: Array  # [tokens behind the first event]
    rates: Array  # [num_windows]
    duration_s: float
    tps: float
    broke: bool


def _stream_of(record: RequestRecord) -> _Stream | None:
    """None for a record whose events all came at once."""
    times, events = np.array(record.token_times), np.array(record.token_counts)
    counts = spread(events, record.output_tokens)
    rates = window_rates(times, counts)
    if not rates.size:
        return None
    gaps, duration_s = np.diff(times), float(times[-1] - times[0])
    return _Stream(
        gaps_s=gaps,
        inter_token_s=np.repeat(gaps / counts[1:], events[1:]),
        rates=rates,
        duration_s=duration_s,
        tps=float(counts[1:].sum()) / duration_s,
        broke=record.status == "error",
    )


def _statuses(records: Sequence[RequestRecord]) -> dict[str, int]:
    statuses = [record.status for record in records]
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def _percentiles(values: Sequence[float] | Array) -> Percentiles | None:
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Percentiles(len(values), float(np.mean(values)), p50, p90, p99)


def _joined(arrays: Iterable[Array]) -> Array:
    return np.concatenate([np.empty(0), *arrays])


def _ttfts(records: Iterable[RequestRecord]) -> list[float]:
    return [ttft for record in records if (ttft := record.ttft_s) is not None]


def _ttft_classes(records: Sequence[RequestRecord]) -> tuple[TtftClass, ...]:
    """Those that have a prompt in them."""
    told = [(each, n) for each in records if (n := each.computed_tokens) is not None]
    classes = []
    for i, least in enumerate(UNCACHED_EDGES):
        below = UNCACHED_EDGES[i + 1] if i + 1 < len(UNCACHED_EDGES) else None
        limit = float("inf") if below is None else below
        inside = [record for record, computed in told if least <= computed < limit]
        if (found := _percentiles(_ttfts(inside))) is not None:
            classes.append(TtftClass(least, below, found))
    return tuple(classes)


def _stream_tps(streams: Sequence[_Stream]) -> Rates | None:
    if not streams:
        return None
    means = [one.tps for one in streams]
    p50, p10, p1 = np.percentile(means, [50, 10, 1]).tolist()
    return Rates(p50, p10, p1, min(means))


def _window_tps(streams: Sequence[_Stream]) -> Rates | None:
    """Windows overlap, so a stream's share its seconds: a long stream counts for its length."""
    if not streams:
        return None
    rates = _joined(one.rates for one in streams)
    weights = _joined(np.full(len(s.rates), s.duration_s / len(s.rates)) for s in streams)
    p50, p10, p1 = (weighted_percentile(rates, weights, percent) for percent in (50, 10, 1))
    return Rates(p50, p10, p1, float(rates.min()))


def _floor(floor: float, streams: Sequence[_Stream], seconds: float) -> FloorResult:
    kept = Attainment([floor])
    for one in streams:
        kept.add(one.rates, one.duration_s)
    held = [one for one in streams if not one.broke and worst_rate(one.rates) >= floor]
    return FloorResult(
        floor=floor,
        attainment=kept.share(floor) if streams else 0.0,
        num_streams=len(streams),
        held_streams=len(held),
        held_users=sum(one.duration_s for one in held) / seconds if seconds else 0.0,
    )


def _hit_rate(records: Iterable[RequestRecord]) -> float | None:
    """Of the input tokens of those that tell; None if none does."""
    told = [(r.cached_tokens, r.input_tokens) for r in records if r.cached_tokens is not None]
    whole = sum(tokens for _, tokens in told)
    return sum(cached for cached, _ in told) / whole if whole else None


def _cost(
    price: Price | None,
    tokens: tuple[int, int, int],
    device_s: float,
    records: Iterable[RequestRecord],
) -> float | None:
    """For each session that got a token. `tokens`: computed, cached, output."""
    sessions = {record.session_id for record in records}
    if price is None or not sessions:
        return None
    prices = (price.computed_input, price.cached_input, price.output)
    total = sum(one * number / 1e6 for one, number in zip(prices, tokens, strict=True))
    return (total + price.device_hour * device_s / 3600) / len(sessions)


def _refusals(records: Sequence[RequestRecord]) -> Refusals:
    refused = [record for record in records if record.status == "refused"]
    told = [record.retry_after_s for record in refused if record.retry_after_s is not None]
    return Refusals(
        count=len(refused),
        share=len(refused) / len(records) if records else 0.0,
        answer_s=_percentiles([record.end_s - record.sent_s for record in refused]),
        with_retry_after=len(told),
        retry_after_s=_percentiles(told),
    )
