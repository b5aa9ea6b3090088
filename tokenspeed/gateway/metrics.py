# SPDX-License-Identifier: MIT
"""`Metrics`: the gateway's numbers, named as vLLM names them. Knows no Prometheus, no user text.

Counting is on the path of every token, so a histogram here is a list and a bisection;
`gateway/exposition.py` makes Prometheus' objects of it when somebody scrapes.
"""

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import Any

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

    def add(self, counts: list[int], total: float) -> None:
        """What another one has counted within the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.sum += total


class EngineMetrics:
    """What one engine did. One writer: the event loop. Labels never carry what a client sent."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.cache: dict[str, str] = {}  # what the KV cache is like, once it is known
        self.counters: Counter[str] = Counter()  # names of vLLM, without `_total`
        self.routing: Counter[str] = Counter()  # names of ours, without `routing_` and `_total`
        self.finished: Counter[str] = Counter()  # by finish reason
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


class Metrics:
    """All that is counted: what each engine did, and the requests that no engine was given."""

    def __init__(self, model_name: str, num_engines: int = 1) -> None:
        self.model_name = model_name
        self.engines = [EngineMetrics() for _ in range(num_engines)]
        self.rejections: Counter[str] = Counter()  # by reason, a fixed set of words
        # Seconds of streams at their floor, below it, and without one. Each grows by itself: what
        # is a difference of two sums may fall by a rounding, which is a reset to who reads it.
        self.streams = {"held": 0.0, "missed": 0.0, "none": 0.0}

    def counted(self) -> dict[str, Any]:
        """What this gateway has counted itself, as JSON has it."""
        return {
            "rejections": self.rejections,
            "streams": self.streams,
            "engines": [_counted(e) for e in self.engines],
        }

    def with_others(self, others: Iterable[dict[str, Any]]) -> "Metrics":
        """These and what other gateways before the same engines have `counted`."""
        total = copy.deepcopy(self)
        for other in others:
            total.rejections.update(other["rejections"])
            for word, seconds in other["streams"].items():
                total.streams[word] += seconds
            for engine, counted in zip(total.engines, other["engines"], strict=True):
                for name, value in counted.items():
                    mine = getattr(engine, name)
                    mine.add(*value) if isinstance(mine, Histogram) else mine.update(value)
        return total


def _counted(engine: EngineMetrics) -> dict[str, Any]:
    own = {name: v for name, v in vars(engine).items() if isinstance(v, Counter | Histogram)}
    return {n: (v.counts, v.sum) if isinstance(v, Histogram) else v for n, v in own.items()}
