# SPDX-License-Identifier: MIT
"""What is asked of a server, by another client and by `tokenspeed bench`, and the figures of both.

Two loads: single requests of one length, and sessions that grow. Knows no client but our own.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.compare import calibrate
from tokenspeed.bench.prompts import Prompts
from tokenspeed.bench.records import read_runs
from tokenspeed.bench.serving import serving_result
from tokenspeed.bench.session import Workload
from tokenspeed.bench.workloads import published, weka

# Counts must be equal, the others near; a client tells what it knows of them.
COUNTS = ("requests", "output_tokens")
FIGURES = (
    *COUNTS,
    "input_tokens",
    "output_tokens_per_s",
    "ttft_mean_ms",
    "ttft_p50_ms",
    "tpot_mean_ms",
    "tpot_p50_ms",
    "itl_mean_ms",
)
MODEL = "demo"
Figures = dict[str, float]
Json = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """Lengths in tokens. Sessions begin with `first` and grow by `growth` a turn."""

    concurrency: int
    requests: int = 24
    input_tokens: int = 1000
    output_tokens: int = 128
    sessions: int = 4
    turns: int = 6
    first: int = 1500
    growth: int = 150
    turn_output: int = 64

    def workload(self, seed: int) -> Workload:
        """The sessions. Their shape is one for all seeds; the seed is the texts'."""
        return published.make(
            sessions=self.sessions,
            seed=seed,
            first=self.first,
            growth=self.growth,
            turns=(self.turns, self.turns),
            output=self.turn_output,
        )


@dataclass(frozen=True)
class Place:
    """Where one run is: its server, a folder of its own, a seed that no other run had."""

    url: str
    tokenizer: Path
    folder: Path
    seed: int
    tokens_per_word: float

    def write_weka(self, load: Load) -> Path:
        """A folder as aiperf and `tokenspeed bench` read it."""
        weka.write(load.workload(self.seed), self.folder / "weka")
        return self.folder / "weka"

    def write_swe_smith(self, load: Load) -> Path:
        """A file as evalscope keeps conversations: what the user adds, turn by turn."""
        texts, found = Prompts(self.seed, self.tokens_per_word), []
        for session in load.workload(self.seed).sessions:
            turns = []
            for index, turn in enumerate(session.turns):
                _, said = texts.conversation(session, index)[-1]
                messages = [{"role": "user", "content": said}]
                turns.append({"messages": messages, "prompt_tokens": turn.input_tokens})
            found.append(turns)
        file = self.folder / "swe_smith.json"
        file.write_text(json.dumps({"conversations": found}))
        return file


def tokens_per_word(url: str) -> float:
    """What the server's tokenizer makes of a word of our prompts. `RuntimeError`: it tells not."""
    words, reason = asyncio.run(calibrate([Endpoint("server", url, MODEL)]))
    if reason is not None:
        raise RuntimeError(reason)
    return words


def our_single(load: Load, place: Place) -> list[str]:
    return [
        *_ours(place, "serve", "--backend", "openai", "--dataset-name", "random"),
        *("--random-input-len", str(load.input_tokens)),
        *("--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--ignore-eos", "--save-result", "--result-filename", str(place.folder / "ours.json")),
    ]


def our_sessions(load: Load, place: Place, history: str) -> list[str]:
    return [
        *_ours(place, "agentic", "--workload", "weka", "--history", history),
        *("--workload-file", str(place.write_weka(load)), "--sessions", str(load.sessions)),
        *("--concurrency", str(load.concurrency), "--time-scale", "0"),
        *("--tokens-per-word", str(place.tokens_per_word), "--output", str(place.folder)),
    ]


def our_figures(folder: Path) -> Figures:
    """Of `serve` what it saved; of `agentic` the same figures of its records."""
    file = folder / "ours.json"
    if file.exists():
        return serving_figures(json.loads(file.read_text()))
    (run,) = read_runs(folder / "raw.jsonl")
    return serving_figures(serving_result(run, ("ttft", "tpot", "itl"), ()))


def serving_figures(told: Json) -> Figures:
    """What vLLM's `benchmark_serving.py` saves, under our names."""
    return {
        "requests": told["completed"],
        "output_tokens": told["total_output_tokens"],
        "input_tokens": told["total_input_tokens"],
        "output_tokens_per_s": told["output_throughput"],
        "ttft_mean_ms": told["mean_ttft_ms"],
        "ttft_p50_ms": told["median_ttft_ms"],
        "tpot_mean_ms": told["mean_tpot_ms"],
        "tpot_p50_ms": told["median_tpot_ms"],
        "itl_mean_ms": told["mean_itl_ms"],
    }


def _ours(place: Place, command: str, *more: str) -> list[str]:
    start = [sys.executable, "-m", "tokenspeed", "bench", command, "--base-url", place.url]
    return [*start, "--model", MODEL, "--seed", str(place.seed), *more]
