# SPDX-License-Identifier: MIT
"""What is asked of every engine, which figures come of it, and what they are compared by. Pure.

A measure is one request, or two, whose token times give some figures. A figure has a name, a unit
and a better direction. Knows no engine and no process.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

VOCAB = 32768
Times = list[list[float]]  # by stream, seconds from the request to each token
Generate = Callable[[list[list[int]], int], Times]  # prompts, tokens each


@dataclass(frozen=True)
class Figure:
    """One number of an engine."""

    name: str
    title: str
    unit: str
    higher_is_better: bool
    digits: int = 1


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("start", "start to ready", "s", False, 2),
        Figure("prefill_512", "prefill 512", "tokens/s", True, 0),
        Figure("prefill_4096", "prefill 4,096", "tokens/s", True, 0),
        Figure("decode_512", "decode at 512", "tokens/s", True),
        Figure("decode_4096", "decode at 4,096", "tokens/s", True),
        Figure("streams_8", "8 streams at 512, sum", "tokens/s", True),
        Figure("cold_3072", "TTFT of 3,072 tokens, cold", "s", False, 2),
        Figure("warm_3072", "TTFT of 32 tokens on them, warm", "s", False, 3),
        Figure("memory", "resident (proportional)", "MB", False, 0),
        Figure("error_rms", "logits, RMS error over RMS", "", False, 5),
        Figure("error_max", "logits, largest error", "", False, 3),
    )
}


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCAB) for _ in range(length)]


def short(generate: Generate, rng: random.Random) -> dict[str, float]:
    """512 tokens, then 64 more."""
    [times] = generate([random_prompt(rng, 512)], 65)
    return {"prefill_512": 512 / times[0], "decode_512": rate(times)}


def long(generate: Generate, rng: random.Random) -> dict[str, float]:
    """4,096 tokens, then 32 more."""
    [times] = generate([random_prompt(rng, 4096)], 33)
    return {"prefill_4096": 4096 / times[0], "decode_4096": rate(times)}


def streams(generate: Generate, rng: random.Random) -> dict[str, float]:
    """Eight prompts of 512 tokens, 48 more each; what all of them decode together counts."""
    return {"streams_8": together(generate([random_prompt(rng, 512) for _ in range(8)], 49))}


def warm(generate: Generate, rng: random.Random) -> dict[str, float]:
    """3,072 tokens, then the same and 32 new ones."""
    prefix = random_prompt(rng, 3072)
    [[cold]] = generate([prefix], 1)
    [[hit]] = generate([prefix + random_prompt(rng, 32)], 1)
    return {"cold_3072": cold, "warm_3072": hit}


MEASURES: Mapping[str, Callable[[Generate, random.Random], dict[str, float]]] = {
    "short": short,
    "long": long,
    "streams": streams,
    "warm": warm,
}


def rate(times: list[float]) -> float:
    """Tokens per second after the first."""
    return (len(times) - 1) / (times[-1] - times[0])


def together(times: Times) -> float:
    """Tokens per second of all streams, from when the last one has begun to when one ends."""
    begin, end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    if end <= begin:
        raise ValueError("a stream ended before all had begun: ask for more tokens")
    return sum(begin < at <= end for stream in times for at in stream) / (end - begin)


def logits_error(found: list[float], reference: list[float]) -> tuple[float, float]:
    """(RMS of the error over RMS of the reference, largest error), both less their means.

    Logits and log-probabilities differ by a constant, so means are taken off.
    """
    if len(found) != len(reference):
        raise ValueError(f"{len(found)} logits, {len(reference)} in the reference")
    mean, mean_reference = sum(found) / len(found), sum(reference) / len(reference)
    centred = [value - mean_reference for value in reference]
    errors = [a - mean - b for a, b in zip(found, centred, strict=True)]
    squares = sum(b * b for b in centred)
    rms: float = (sum(e * e for e in errors) / squares) ** 0.5
    return rms, max(abs(e) for e in errors)
