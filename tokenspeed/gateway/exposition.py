# SPDX-License-Identifier: MIT
"""`Metrics` in Prometheus' text format, under vLLM's names. Made anew at every scrape."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tokenspeed.gateway.metrics import Histogram, Metrics

_LABELS = ["model_name", "engine"]


def exposition(metrics: Metrics) -> bytes:
    """What /metrics answers."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Families(metrics))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._values = [metrics.model_name, "0"]

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        m = self._metrics
        for name, histogram in {
            "time_to_first_token_seconds": m.ttft,
            "inter_token_latency_seconds": m.itl,
            "request_time_per_output_token_seconds": m.per_token,
            "e2e_request_latency_seconds": m.e2e,
            "request_queue_time_seconds": m.queue,
            "request_prefill_time_seconds": m.prefill,
            "request_decode_time_seconds": m.decode,
            "request_inference_time_seconds": m.inference,
            "request_prefill_kv_computed_tokens": m.computed,
            "request_prompt_tokens": m.prompt_tokens,
            "request_generation_tokens": m.generation_tokens,
            "request_params_n": m.params_n,
            "request_params_max_tokens": m.params_max_tokens,
        }.items():
            yield self._histogram(f"vllm:{name}", histogram)

    def _histogram(self, name: str, histogram: Histogram) -> Metric:
        made = HistogramMetricFamily(name, histogram.text, labels=_LABELS)
        total, buckets = 0, []
        for bound, count in zip(
            (*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True
        ):
            total += count
            buckets.append((bound, total))
        made.add_metric(self._values, buckets, histogram.sum)
        return made

    def _gauges(self) -> Iterator[Metric]:
        stats = self._metrics.stats
        for name, text, value in (
            ("num_requests_running", "Requests that run", stats.num_running),
            ("num_requests_waiting", "Requests that wait", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of pages held, 1 is all", stats.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric(self._values, value)
            yield gauge
        cache = self._metrics.cache
        labels = [*_LABELS, *cache]
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache", labels=labels)
        info.add_metric([*self._values, *cache.values()], 1)
        yield info

    def _counters(self) -> Iterator[Metric]:
        m = self._metrics
        plain = {
            "prompt_tokens": m.counters["prompt_tokens"],
            "prompt_tokens_cached": m.counters["prompt_tokens_cached"],
            "generation_tokens": m.counters["generation_tokens"],
            "corrupted_requests": m.finished["error"],
            "num_preemptions": m.stats.num_preemptions,
            "prefix_cache_queries": m.stats.prefix_queries,
            "prefix_cache_hits": m.stats.prefix_hits,
        }
        for name, value in plain.items():
            made = CounterMetricFamily(f"vllm:{name}", name, labels=_LABELS)
            made.add_metric(self._values, value)
            yield made
        for name, label, counts in (
            ("request_success", "finished_reason", m.finished),
            ("admission_rejections", "reason", m.rejections),
        ):
            made = CounterMetricFamily(f"vllm:{name}", name, labels=[*_LABELS, label])
            for word, count in counts.items():
                made.add_metric([*self._values, word], count)
            yield made
