# SPDX-License-Identifier: MIT
"""How near the adaptive depth of speculation comes to the best, simulated: no model, no clock.

Requests of 600 tokens follow each other in every row. A draft is accepted with a probability that
the setting gives; the drafter always has eight. Three shapes of step times: a GPU bound by memory
(a draft costs 0.3% of a step), a CPU bound by arithmetic (0.3 of a step of one row), and a mixture
of experts (a draft costs the experts that nobody else touched). The policy sees times with 10% of
noise, one in a hundred five times as long; what counts is the time without it. It knows nothing at
first but its prior, which is the same for all shapes.

`fixed` is the best of the depths 0 to 8, the same for all rows and steps, chosen in hindsight from
exact expectations. `drafter` says whether drafts are found (free; what was sampled shows whether an
unused draft was right) or proposed by a model (at a cost, and known only if asked for).

    python benchmarks/policy.py [--tokens 20000] [--seeds 2] [--json FILE]
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import Acceptance, DepthPolicy, StepTimeModel, experts_touched
from tokenspeed.engine.step_times import Experts, features

MAX_DEPTH = 8
REQUEST_TOKENS, PHASE_TOKENS = 600, 150
EXPERTS, EXPERTS_PER_TOKEN = 128, 8
# Acceptance in the phases of a request; a further tuple is another kind of request, by turns.
TEXTS: dict[str, tuple[tuple[float, ...], ...]] = {
    "0": ((0.0,),),
    "0.3": ((0.3,),),
    "0.69": ((0.69,),),
    "0.95": ((0.95,),),
    "0 | 0.95": ((0.0,), (0.95,)),
    "0.95>0": ((0.95, 0.0),),
    "0.95>0.3": ((0.95, 0.3),),
}


@dataclass(frozen=True)
class Shape:
    """Seconds of a step."""

    name: str
    seconds: Callable[[float, float], float]  # of tokens, rows among them
    propose_s: float  # for a token
    experts: tuple[int, int] = (0, 0)  # of a layer, and of a token


SHAPES = (
    Shape("gpu", lambda tokens, rows: 8e-3 + 2.4e-5 * tokens, 2e-4),
    Shape("cpu", lambda tokens, rows: 0.45e-3 + 0.2e-3 * tokens, 3e-5),
    Shape(
        "moe",
        lambda tokens, rows: (
            3e-3 + 3e-5 * tokens + 1e-4 * experts_touched(tokens, EXPERTS, EXPERTS_PER_TOKEN)
        ),
        1e-4,
        (EXPERTS, EXPERTS_PER_TOKEN),
    ),
)


@dataclass(frozen=True)
class Setting:
    shape: Shape
    text: str
    rows: int
    proposes: bool

    def step_s(self, num_drafts: int) -> float:
        proposing = self.shape.propose_s * num_drafts if self.proposes else 0.0
        return self.shape.seconds(self.rows + num_drafts, self.rows) + proposing

    def fixed_tps(self, depth: int) -> float:
        """Tokens a second of all rows with that depth; exact but for the ends of phases."""
        phases = [p for kind in TEXTS[self.text] for p in kind]
        steps_per_token = statistics.mean(
            1 / sum(p**j for j in range(depth + 1)) if p else 1.0 for p in phases
        )
        return self.rows / steps_per_token / self.step_s(self.rows * depth)


class Run:
    """One setting under the policy."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self._setting = setting
        self._rng = np.random.default_rng(seed)
        self.times = StepTimeModel()
        self._acceptance = Acceptance(1)
        num_experts, experts_per_token = setting.shape.experts
        self._policy = DepthPolicy(
            self.times,
            self._acceptance,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
        )
        rows = setting.rows
        self._ids = np.arange(rows, dtype=np.uint64)
        # Rows do not begin together.
        self._produced = self._rng.integers(0, REQUEST_TOKENS, rows)
        self._zeros = np.zeros(rows, np.int32)
        self._proposes = np.full(rows, setting.proposes)

    def tps(self, num_tokens: int) -> float:
        tokens, seconds = 0, 0.0
        limits = np.full(self._setting.rows, MAX_DEPTH, np.int32)
        while tokens < num_tokens:
            base = self._features(self._zeros)
            depths = self._policy.choose(
                base, self._ids, self._zeros, self._zeros, limits, self._proposes, 10_000
            )
            step_s = self._setting.step_s(int(depths.sum()))
            self.times.observe(self._features(depths), step_s * self._noise())
            tokens += self._commit(depths)
            seconds += step_s
        return tokens / seconds

    def _features(self, depths: NDArray[np.int32]) -> NDArray[np.float64]:
        drafts, proposes = int(depths.sum()), self._setting.proposes
        return features(
            Experts(*self._setting.shape.experts),
            rows=self._setting.rows,
            verify=drafts,
            context=int(self._produced.sum()),
            propose=drafts if proposes else 0,
            deepest=int(depths.max()) if proposes else 0,
        )

    def _noise(self) -> float:
        spike = 5.0 if self._rng.random() < 0.01 else 1.0
        return spike * float(self._rng.lognormal(0.0, 0.1))

    def _commit(self, depths: NDArray[np.int32]) -> int:
        kinds = TEXTS[self._setting.text]
        hits = np.zeros(len(depths), np.int32)
        for row, request_id in enumerate(self._ids):
            phases = kinds[int(request_id) // self._setting.rows % len(kinds)]
            p = phases[int(self._produced[row]) // PHASE_TOKENS % len(phases)]
            while hits[row] < MAX_DEPTH and self._rng.random() < p:
                hits[row] += 1
        accepted = np.minimum(hits, depths)
        seen = depths if self._setting.proposes else np.minimum(depths + 1, MAX_DEPTH)
        known = np.minimum(hits, seen).astype(np.int32)
        self._acceptance.observe(self._ids, self._zeros, self._zeros, known, hits < seen)
        self._produced += accepted + 1
        for row in np.flatnonzero(self._produced >= REQUEST_TOKENS).tolist():
            self._acceptance.forget(int(self._ids[row]))
            self._ids[row] += np.uint64(self._setting.rows)
            self._produced[row] = 0
        return int(accepted.sum()) + len(depths)


def measured(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    runs = [Run(setting, seed) for seed in range(args.seeds)]
    tps = statistics.mean(run.tps(args.tokens) for run in runs)
    fixed = [setting.fixed_tps(depth) for depth in range(MAX_DEPTH + 1)]
    best = max(range(len(fixed)), key=fixed.__getitem__)
    return {
        "shape": setting.shape.name,
        "drafter": "model" if setting.proposes else "found",
        "rows": setting.rows,
        "acceptance": setting.text,
        "best_depth": best,
        "fixed_tps": round(fixed[best]),
        "tps": round(tps),
        "of_fixed": round(tps / fixed[best], 3),
        "of_off": round(tps / fixed[0], 3),
        "time_error": round(statistics.mean(run.times.median_relative_error for run in runs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    args = parser.parse_args()
    results = []
    for shape, proposes, rows, text in itertools.product(SHAPES, (False, True), (1, 16), TEXTS):
        results.append(measured(Setting(shape, text, rows, proposes), args))
        if len(results) == 1:
            print("  ".join(f"{name:>10}" for name in results[0]))
        print("  ".join(f"{value:>10}" for value in results[-1].values()), flush=True)
    least_off = min(r["of_off"] for r in results)
    stationary = [r["of_fixed"] for r in results if r["acceptance"] in ("0", "0.3", "0.69", "0.95")]
    line = json.dumps(
        {
            "benchmark": "policy",
            "least_of_off": least_off,
            "least_of_fixed_stationary": min(stationary),
            "results": results,
        }
    )
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
