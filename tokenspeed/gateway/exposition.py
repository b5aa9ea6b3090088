# SPDX-License-Identifier: MIT
"""`Metrics` in Prometheus' text format, under vLLM's names. Made anew at every scrape.

Every series is one engine's, by its number, but for the refusals: those are requests that no engine
was given.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tokenspeed.engine.messages import PacingStats, StepTimeStats
from tokenspeed.gateway.draft_metrics import draft_metrics
from tokenspeed.gateway.metrics import EngineMetrics, Histogram, Metrics

_LABELS = ["model_name", "engine"]
_GAUGES = {  # text, field of the engine's own count
    "vllm:num_requests_running": ("Requests that run", "num_running"),
    "vllm:num_requests_waiting": ("Requests that wait", "num_waiting"),
    "vllm:kv_cache_usage_perc": ("Share of pages held, 1 is all", "kv_cache_usage"),
    "tokenspeed:retained_pages": ("Cached pages under retention", "num_retained_pages"),
    "tokenspeed:pinned_pages": ("Cached pages that are pinned", "num_pinned_pages"),
    "tokenspeed:idle_pages": ("Cached pages that wait for a hit", "num_cached_pages"),
    "tokenspeed:expert_load_imbalance_mean": (
        "Heaviest rank over the mean, mean of the layers; 0 without expert balancing",
        "expert_load_mean",
    ),
    "tokenspeed:expert_load_imbalance_worst": (
        "Heaviest rank over the mean, worst layer",
        "expert_load_worst",
    ),
}
_NO_PACE, _NO_TIMES = PacingStats(), StepTimeStats()
_COUNTERS: dict[str, Callable[[EngineMetrics], float]] = {
    "vllm:prompt_tokens": lambda e: e.counters["prompt_tokens"],
    "vllm:prompt_tokens_cached": lambda e: e.counters["prompt_tokens_cached"],
    "vllm:generation_tokens": lambda e: e.counters["generation_tokens"],
    "vllm:corrupted_requests": lambda e: e.finished["error"],
    "vllm:num_preemptions": lambda e: e.stats.num_preemptions,
    "vllm:prefix_cache_queries": lambda e: e.stats.prefix_queries,
    "vllm:prefix_cache_hits": lambda e: e.stats.prefix_hits,
    "tokenspeed:expert_load_rebalances": lambda e: e.stats.expert_load_rebalances,
    "tokenspeed:expert_load_slots_moved": lambda e: e.stats.expert_load_slots_moved,
    "tokenspeed:steps": lambda e: e.stats.num_steps,
    "tokenspeed:step_seconds": lambda e: e.stats.busy_s,
    "tokenspeed:step_predicted_seconds": lambda e: (e.stats.step_times or _NO_TIMES).predicted_s,
    "tokenspeed:step_measured_seconds": lambda e: (e.stats.step_times or _NO_TIMES).measured_s,
    "tokenspeed:outputs_late": lambda e: (e.stats.pacing or _NO_PACE).num_late,
    "tokenspeed:floors_unmeetable": lambda e: (e.stats.pacing or _NO_PACE).num_unmeetable,
    "tokenspeed:floor_misses_for_progress": lambda e: (
        (e.stats.pacing or _NO_PACE).floor_misses_for_progress
    ),
    "tokenspeed:routing_requests": lambda e: e.routing["requests"],
    "tokenspeed:routing_matched_tokens": lambda e: e.routing["matched_tokens"],
    "tokenspeed:routing_overridden": lambda e: e.routing["overridden"],
}
_TOKENS = {"prefill": "num_prefill_tokens", "decode": "num_decode_tokens"}
_TOKENS |= {"draft": "num_draft_tokens"}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "ttft",
    "inter_token_latency_seconds": "itl",
    "request_time_per_output_token_seconds": "per_token",
    "e2e_request_latency_seconds": "e2e",
    "request_queue_time_seconds": "queue",
    "request_prefill_time_seconds": "prefill",
    "request_decode_time_seconds": "decode",
    "request_inference_time_seconds": "inference",
    "request_prefill_kv_computed_tokens": "computed",
    "request_prompt_tokens": "prompt_tokens",
    "request_generation_tokens": "generation_tokens",
    "request_params_n": "params_n",
    "request_params_max_tokens": "params_max_tokens",
}


def exposition(metrics: Metrics) -> bytes:
    """What /metrics answers."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Families(metrics))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._engines = [
            ([metrics.model_name, str(number)], engine)
            for number, engine in enumerate(metrics.engines)
        ]

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._words()
        drafts = ((labels, engine.stats.speculation) for labels, engine in self._engines)
        yield from draft_metrics(_LABELS, drafts)
        for name, attribute in _HISTOGRAMS.items():
            yield self._histogram(f"vllm:{name}", attribute)

    def _histogram(self, name: str, attribute: str) -> Metric:
        text = getattr(self._metrics.engines[0], attribute).text
        made = HistogramMetricFamily(name, text, labels=_LABELS)
        for labels, engine in self._engines:
            histogram: Histogram = getattr(engine, attribute)
            total, buckets = 0, []
            for bound, count in zip(
                (*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True
            ):
                total += count
                buckets.append((bound, total))
            made.add_metric(labels, buckets, histogram.sum)
        return made

    def _gauges(self) -> Iterator[Metric]:
        for name, (text, attribute) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for labels, engine in self._engines:
                gauge.add_metric(labels, getattr(engine.stats, attribute))
            yield gauge
        error = GaugeMetricFamily(
            "tokenspeed:step_time_error",
            "Median relative error of what is foretold",
            labels=_LABELS,
        )
        for labels, engine in self._engines:
            error.add_metric(labels, (engine.stats.step_times or _NO_TIMES).error)
        yield error
        keys = list(self._metrics.engines[0].cache)
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache", labels=[*_LABELS, *keys])
        for labels, engine in self._engines:
            info.add_metric([*labels, *(engine.cache.get(key, "") for key in keys)], 1)
        yield info

    def _counters(self) -> Iterator[Metric]:
        for name, value in _COUNTERS.items():
            made = CounterMetricFamily(name, name.partition(":")[2], labels=_LABELS)
            for labels, engine in self._engines:
                made.add_metric(labels, value(engine))
            yield made

    def _words(self) -> Iterator[Metric]:
        """Counters by a word of a fixed set."""
        ended = CounterMetricFamily(
            "vllm:request_success", "request_success", labels=[*_LABELS, "finished_reason"]
        )
        for labels, engine in self._engines:
            for word, count in engine.finished.items():
                ended.add_metric([*labels, word], count)
        yield ended
        refused = CounterMetricFamily(
            "vllm:admission_rejections", "admission_rejections", labels=["model_name", "reason"]
        )
        for word, count in self._metrics.rejections.items():
            refused.add_metric([self._metrics.model_name, word], count)
        yield refused
        computed = CounterMetricFamily(
            "tokenspeed:step_tokens", "Tokens that steps computed", labels=[*_LABELS, "kind"]
        )
        for labels, engine in self._engines:
            for word, attribute in _TOKENS.items():
                computed.add_metric([*labels, word], getattr(engine.stats, attribute))
        yield computed
        yield self._floors()

    def _floors(self) -> Metric:
        made = CounterMetricFamily(
            "tokenspeed:stream_seconds",
            "Seconds of streams, by whether they were at their floor",
            labels=["model_name", "floor"],
        )
        for word, seconds in self._metrics.streams.items():
            made.add_metric([self._metrics.model_name, word], seconds)
        return made
