# SPDX-License-Identifier: MIT
"""What /metrics says of speculative decoding. Knows Prometheus' families, no drafter.

The `vllm:` series are over all drafters, with vLLM's labels and no others, so that what reads them
there reads them here; those by drafter are ours.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tokenspeed.engine.messages import DrafterStats, SpeculationStats

Engines = Iterable[tuple[list[str], SpeculationStats | None]]  # their labels and what they counted

_NOTHING = SpeculationStats([], [])
_COUNTS: dict[str, Callable[[DrafterStats], int]] = {
    "drafts": lambda drafter: drafter.num_drafts,
    "draft_tokens": lambda drafter: drafter.num_draft_tokens,
    "accepted_tokens": lambda drafter: drafter.num_accepted_tokens,
}


def draft_metrics(labels: list[str], engines: Engines) -> Iterator[Metric]:
    """The families; 0 for an engine that does not speculate."""
    known = [(values, stats or _NOTHING) for values, stats in engines]
    for what, count in _COUNTS.items():
        total = CounterMetricFamily(f"vllm:spec_decode_num_{what}", what, labels=labels)
        each = CounterMetricFamily(
            f"tokenspeed:spec_decode_{what}", f"{what}, by drafter", labels=[*labels, "drafter"]
        )
        for values, stats in known:
            total.add_metric(values, sum(map(count, stats.drafters)))
            for drafter in stats.drafters:
                each.add_metric([*values, drafter.name], count(drafter))
        yield from (total, each)
    yield _per_place(labels, known)
    yield _depths(labels, known)


def _per_place(labels: list[str], known: list[tuple[list[str], SpeculationStats]]) -> Metric:
    made = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Drafts whose token at this position, from 0 on, was accepted",
        labels=[*labels, "position"],
    )
    for values, stats in known:
        places = [drafter.accepted_per_pos for drafter in stats.drafters]
        for place in range(max(map(len, places), default=0)):
            count = sum(counts[place] for counts in places if place < len(counts))
            made.add_metric([*values, str(place)], count)
    return made


def _depths(labels: list[str], known: list[tuple[list[str], SpeculationStats]]) -> Metric:
    made = HistogramMetricFamily(
        "tokenspeed:spec_decode_depth", "Draft tokens that a decoding row was given", labels=labels
    )
    for values, stats in known:
        total, buckets = 0, []
        for depth, count in enumerate(stats.depths):
            total += count
            buckets.append((f"{depth}.0", float(total)))
        weighted = sum(depth * count for depth, count in enumerate(stats.depths))
        made.add_metric(values, [*buckets, ("+Inf", float(total))], weighted)
    return made
