# SPDX-License-Identifier: MIT
"""`Metrics`: what /metrics shows, under vLLM's names. Knows numbers; labels never carry user text.

Counting is on the path of every token, so a histogram here is a list and a bisection; the
Prometheus objects are made only when somebody scrapes.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tokenspeed.engine.messages import EngineStats

Bounds = tuple[float, ...]
TTFT: Bounds = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL: Bounds = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.01, 0.0125, 0.0143, 0.025),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0),
)
LATENCY: Bounds = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS: Bounds = (*(float(d * 10**e) for e in range(6) for d in (1, 2, 5)), 1e6)
COUNT: Bounds = (1.0, 2.0, 5.0, 10.0, 20.0)


class Histogram:
    """Counts of observations by upper bound."""

    def __init__(self, bounds: Bounds, text: str) -> None:
        self.bounds, self.text = bounds, text
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def family(self, name: str, label: str) -> Metric:
        made = HistogramMetricFamily(name, self.text, labels=["model_name", "engine"])
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        made.add_metric([label, "0"], buckets, self.sum)
        return made


class Metrics(Collector):
    """The process's numbers. One writer: the event loop."""

    def __init__(self, model_name: str) -> None:
        self._label = model_name
        self.stats = EngineStats()
        self.cache: dict[str, str] = {}  # what the KV cache is like, once it is known
        self.counters: Counter[str] = Counter()  # names of vLLM, without `_total`
        self.finished: Counter[str] = Counter()  # by finish reason
        self.rejections: Counter[str] = Counter()  # by reason, a fixed set of words
        self.ttft = Histogram(TTFT, "Seconds to the first token")
        self.itl = Histogram(ITL, "Seconds between the outputs of a request")
        self.per_token = Histogram(ITL, "Mean seconds per output token of a request")
        self.e2e = Histogram(LATENCY, "Seconds from arrival to the last token")
        self.queue = Histogram(LATENCY, "Seconds in the queue")
        self.prefill = Histogram(LATENCY, "Seconds of prefill")
        self.decode = Histogram(LATENCY, "Seconds from the first token to the last")
        self.inference = Histogram(LATENCY, "Seconds from the first step to the last token")
        self.computed = Histogram(TOKENS, "Prompt tokens of a request that no cache held")
        self.prompt_tokens = Histogram(TOKENS, "Prompt tokens of a request")
        self.generation_tokens = Histogram(TOKENS, "Generated tokens of a request")
        self.params_n = Histogram(COUNT, "The field n")
        self.params_max_tokens = Histogram(TOKENS, "The field max_tokens")
        self.started = time.time()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for name, histogram in {
            "time_to_first_token_seconds": self.ttft,
            "inter_token_latency_seconds": self.itl,
            "request_time_per_output_token_seconds": self.per_token,
            "e2e_request_latency_seconds": self.e2e,
            "request_queue_time_seconds": self.queue,
            "request_prefill_time_seconds": self.prefill,
            "request_decode_time_seconds": self.decode,
            "request_inference_time_seconds": self.inference,
            "request_prefill_kv_computed_tokens": self.computed,
            "request_prompt_tokens": self.prompt_tokens,
            "request_generation_tokens": self.generation_tokens,
            "request_params_n": self.params_n,
            "request_params_max_tokens": self.params_max_tokens,
        }.items():
            yield histogram.family(f"vllm:{name}", self._label)

    def _gauges(self) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Requests that run", self.stats.num_running),
            ("num_requests_waiting", "Requests that wait", self.stats.num_waiting),
            ("kv_cache_usage_perc", "Share of pages held, 1 is all", self.stats.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
            gauge.add_metric([self._label, "0"], value)
            yield gauge
        labels = ["model_name", "engine", *self.cache]
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache", labels=labels)
        info.add_metric([self._label, "0", *self.cache.values()], 1)
        yield info

    def _counters(self) -> Iterator[Metric]:
        stats = {
            "corrupted_requests": self.finished["error"],
            "num_preemptions": self.stats.num_preemptions,
            "prefix_cache_queries": self.stats.prefix_queries,
            "prefix_cache_hits": self.stats.prefix_hits,
        }
        plain = ("prompt_tokens", "generation_tokens", "prompt_tokens_cached")
        for name, value in {**{n: self.counters[n] for n in plain}, **stats}.items():
            made = CounterMetricFamily(f"vllm:{name}", name, labels=["model_name", "engine"])
            made.add_metric([self._label, "0"], value)
            yield made
        for name, label, counts in (
            ("request_success", "finished_reason", self.finished),
            ("admission_rejections", "reason", self.rejections),
        ):
            labels = ["model_name", "engine", label]
            made = CounterMetricFamily(f"vllm:{name}", name, labels=labels)
            for word, count in counts.items():
                made.add_metric([self._label, "0", word], count)
            yield made
