# SPDX-License-Identifier: MIT
"""A run in the figures and names of vLLM's `benchmark_serving.py`, for scripts that read those.

Takes its definitions: TPOT is (end - first token) / (tokens - 1) of a request, ITL the time between
two events of a stream, E2EL from sending to the end. Only answered requests count.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokenspeed.bench.records import RequestRecord, Run

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def check_metrics(metrics: Sequence[str], percentiles: Sequence[float]) -> None:
    """Raises ValueError for a metric that is none, or a percentile outside of 0 to 100."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"percentile-metrics: one of {', '.join(METRICS)}, not {name!r}")
    for percent in percentiles:
        if not 0 <= percent <= 100:
            raise ValueError(f"metric-percentiles: must be from 0 to 100, not {percent}")


def serving_result(
    run: Run, metrics: Sequence[str], percentiles: Sequence[float]
) -> dict[str, Any]:
    """What `--save-result` saves. Times in milliseconds, `duration` in seconds."""
    done = [record for record in run.records if record.status == "ok"]
    left = [record for record in run.records if record.status == "cancelled"]
    tokens_in = sum(record.input_tokens for record in done)
    tokens_out = sum(record.output_tokens for record in done)
    seconds = run.duration_s or math.inf
    result: dict[str, Any] = {
        "date": run.started_at,
        "endpoint": run.endpoint,
        "base_url": run.base_url,
        "model_id": run.model,
        "duration": run.duration_s,
        "completed": len(done),
        "failed": len(run.records) - len(done) - len(left),
        "cancelled": len(left),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / seconds,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
    }
    for name in metrics:
        result |= _statistics(
            name, [ms for record in done for ms in _TIMES[name](record)], percentiles
        )
    return result


def serving_text(result: dict[str, Any], metrics: Sequence[str]) -> str:
    """The result as the script prints it: a name and a value a line."""
    lines = [
        _line("Successful requests:", result["completed"]),
        _line("Failed requests:", result["failed"]),
        *([_line("Cancelled requests:", result["cancelled"])] if result["cancelled"] else ()),
        _line("Benchmark duration (s):", result["duration"]),
        _line("Total input tokens:", result["total_input_tokens"]),
        _line("Total generated tokens:", result["total_output_tokens"]),
        _line("Request throughput (req/s):", result["request_throughput"]),
        _line("Output token throughput (tok/s):", result["output_throughput"]),
        _line("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    for name in metrics:
        lines.append(f"{METRICS[name]:-^50}")
        for key, value in result.items():
            if key.endswith(f"_{name}_ms"):
                word = key.removesuffix(f"_{name}_ms")
                word = word.upper() if word[0] == "p" else word.capitalize()
                lines.append(_line(f"{word} {name.upper()} (ms):", value))
    title, end = f"{' Serving Benchmark Result ':=^50}", "=" * 50
    return "\n".join([title, *lines, end])


def _statistics(name: str, values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    given = np.asarray(values)
    found = {
        f"mean_{name}_ms": float(given.mean()),
        f"median_{name}_ms": float(np.median(given)),
        f"std_{name}_ms": float(given.std()),
    }
    for percent in percentiles:
        found[f"p{percent:g}_{name}_ms"] = float(np.percentile(given, percent))
    return found


def _ttft(record: RequestRecord) -> Iterator[float]:
    if record.ttft_s is not None:
        yield 1e3 * record.ttft_s


def _tpot(record: RequestRecord) -> Iterator[float]:
    if record.first_token_s is not None and record.output_tokens > 1:
        yield 1e3 * (record.end_s - record.first_token_s) / (record.output_tokens - 1)


def _itl(record: RequestRecord) -> Iterator[float]:
    yield from (1e3 * np.diff(record.token_times)).tolist()


def _e2el(record: RequestRecord) -> Iterator[float]:
    yield 1e3 * (record.end_s - record.sent_s)


_TIMES = {"ttft": _ttft, "tpot": _tpot, "itl": _itl, "e2el": _e2el}


def _line(name: str, value: float) -> str:
    return f"{name:<40}{value:>10}" if isinstance(value, int) else f"{name:<40}{value:>10.2f}"
