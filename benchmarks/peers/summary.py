# SPDX-License-Identifier: MIT
"""Medians, ratios to the best peer, and the aims they are held against. Pure.

A group is one model with one weight type: {engine: {figure: [a number a round]}}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from peers.figures import FIGURES

OURS = "tokenspeed"
Rounds = Mapping[str, Mapping[str, Sequence[float]]]
AIMS: dict[tuple[str, str], dict[str, float]] = {
    ("dense", "bf16"): {
        "prefill_512": 1.05,
        "prefill_4096": 1.1,
        "decode_512": 1.1,
        "decode_4096": 1.3,
        "streams_8": 1.7,
        "warm_3072": 0.7,
    },
    ("mla-moe", "bf16"): {
        "prefill_512": 1.2,
        "prefill_4096": 1.1,
        "decode_512": 1.3,
        "decode_4096": 2.0,
        "streams_8": 2.0,
        "warm_3072": 0.7,
    },
}
QUANTIZED_AIMS = {
    "prefill_512": 1.05,
    "prefill_4096": 1.05,
    "decode_512": 1.2,
    "decode_4096": 1.3,
    "streams_8": 1.6,
    "error_rms": 1.0,
}
LIMITS = {"start": 3.0}  # of ours, whatever the peers do
ROOF_SHARE = 0.85  # of the memory roof, of batch 1 at 512
SPARE_MB = 400  # resident memory beyond weights and KV


@dataclass(frozen=True)
class Line:
    """One figure of ours beside the best peer's."""

    figure: str
    ours: float
    best: float
    best_engine: str
    ratio: float  # ours over theirs: above 1 is more, which for times is worse
    spread: tuple[float, float]  # least and greatest ratio of one round
    aim: float | None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None if there is none."""
        if self.aim is None:
            return None
        better = FIGURES[self.figure].higher_is_better
        return self.ratio >= self.aim if better else self.ratio <= self.aim


def medians(rounds: Rounds) -> dict[str, dict[str, float]]:
    """By engine and figure; figures that an engine never gave are absent."""
    return {
        engine: {name: median(values) for name, values in figures.items() if values}
        for engine, figures in rounds.items()
    }


def aims_of(model: str, weights: str) -> dict[str, float]:
    return QUANTIZED_AIMS if weights != "bf16" else AIMS.get((model, weights), {})


def compare(rounds: Rounds, aims: dict[str, float]) -> list[Line]:
    """Ours against the best peer, figure by figure, in the order of `FIGURES`."""
    middle, lines = medians(rounds), []
    for name, figure in FIGURES.items():
        peers = {e: f[name] for e, f in middle.items() if e.split(" ")[0] != OURS and name in f}
        ours = middle.get(OURS, {}).get(name)
        if ours is None or not peers:
            continue
        best = (max if figure.higher_is_better else min)(peers, key=lambda e: peers[e])
        pairs = zip(rounds[OURS][name], rounds[best][name], strict=False)
        ratios = [a / b for a, b in pairs]
        spread = (min(ratios), max(ratios))
        ratio = ours / peers[best]
        lines.append(Line(name, ours, peers[best], best, ratio, spread, aims.get(name)))
    return lines


def limits(
    middle: Mapping[str, float], roof: Mapping[str, float], memory_mb: float
) -> list[dict[str, Any]]:
    """Ours against fixed limits: start, share of the memory roof, memory beyond what must be."""
    found = []
    if "start" in middle:
        found.append(_limit("start to ready, s", middle["start"], LIMITS["start"], False))
    if "decode_512" in middle and "decode_512" in roof:
        share = middle["decode_512"] / roof["decode_512"]
        found.append(_limit("decode at 512, share of the roof", share, ROOF_SHARE, True))
    if "memory" in middle:
        beyond = middle["memory"] - memory_mb
        found.append(_limit("memory beyond weights and KV, MB", beyond, SPARE_MB, False))
    return found


def _limit(what: str, value: float, limit: float, at_least: bool) -> dict[str, Any]:
    met = value >= limit if at_least else value <= limit
    return {"what": what, "value": round(value, 3), "limit": limit, "met": met}
