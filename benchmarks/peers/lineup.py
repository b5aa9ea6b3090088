# SPDX-License-Identifier: MIT
"""The workers of one model and weight type, one awake at a time. Knows no measures.

All of them stay alive, stopped, if the machine's memory holds them; otherwise those that start fast
are started for each turn and ended after it. What cannot be set up, start or answer is left out
from then on, and `left_out` says why.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import roofs
from peers.checkpoints import CONFIGS, VOCAB
from peers.engines import ENGINES, KV_TOKENS, MAX_LEN
from peers.setup import Home, SetupError
from peers.worker import WORKERS, Worker, WorkerError

SLOW_START_S = 20.0  # such an engine is started once
NEEDED_BYTES = 7 << 29  # of memory, a worker


@dataclass
class Lineup:
    """Engines by name for `model` with `weights`; `ready` once `start` has run."""

    home: Home
    model: str
    weights: str
    threads: int
    engines: list[str]
    kv_bits: int = 16
    keep: bool = True  # alive between turns
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    starts: dict[str, list[float]] = field(default_factory=dict)
    _workers: dict[str, Worker] = field(default_factory=dict)
    _commands: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ready(self) -> list[str]:
        """Engines that have been started and have not failed since."""
        return [name for name in self._commands if name not in self.left_out]

    def prepare(self) -> None:
        """Sets everything up that is not yet."""
        for name in self.engines:
            try:
                self._commands[name] = self._command(name)
            except SetupError as error:
                self.leave_out(name, error)

    def start(self, num_starts: int) -> None:
        """Starts each engine `num_starts` times in turns, those that are slow once."""
        self.keep = NEEDED_BYTES * len(self.ready) < _available_bytes()
        for turn in range(num_starts):
            for name in self.ready:
                if not self._slow(name):
                    self._restart(name, last=turn == num_starts - 1)

    def turn(self, name: str, work: Callable[[Worker], None]) -> None:
        """Gives `work` the engine's worker, the only one that is awake."""
        try:
            worker = self._workers.get(name) or self._start(name)
            worker.resume()
            work(worker)
        except (WorkerError, ValueError) as error:
            self.leave_out(name, error)
            return
        if self.keep or self._slow(name):
            worker.pause()
        else:
            self._end(name)

    def leave_out(self, name: str, error: Exception) -> None:
        """Ends the engine for this line-up, and says so."""
        self.left_out[name] = str(error)
        print(f"LEFT OUT {name} ({self.model}, {self.weights}): {error}", file=sys.stderr)
        self._end(name)

    def close(self) -> None:
        for name in list(self._workers):
            self._end(name)

    def _restart(self, name: str, last: bool) -> None:
        def note(worker: Worker) -> None:
            self.starts.setdefault(name, []).append(worker.start_s)
            self.versions[name] = worker.versions

        self._end(name)
        self.turn(name, note)
        if not last and not self._slow(name):
            self._end(name)

    def _slow(self, name: str) -> bool:
        """Whether the engine is known to start slowly."""
        return name in self.starts and self.starts[name][0] > SLOW_START_S

    def _start(self, name: str) -> Worker:
        engine, log = ENGINES[name], f"worker-{name}-{self.model}-{self.weights}.log"
        folder = str(self.home.folder / "environments" / str(engine.environment))
        given = {k: v.format(environment=folder) for k, v in engine.variables.items()}
        environment = {"OMP_NUM_THREADS": str(self.threads), **given}
        worker = Worker(name, self._commands[name], self.home.logs / log, environment=environment)
        self._workers[name] = worker
        return worker

    def _end(self, name: str) -> None:
        if worker := self._workers.pop(name, None):
            worker.close()

    def _command(self, name: str) -> list[str]:
        engine = ENGINES[name]
        python = self.home.python(engine.environment)
        files = self.home.files(engine, self.model, self.weights)
        options = worker_options(name, files, self.model, self.weights, self.threads, self.kv_bits)
        return [python, str(WORKERS / engine.script), json.dumps(options)]


def _available_bytes() -> int:
    """Memory that new processes can have; Linux's own estimate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kib) * 1024


def worker_options(
    name: str, files: Path, model: str, weights: str, threads: int, kv_bits: int = 16
) -> dict[str, Any]:
    """What the worker's script is told."""
    engine = ENGINES[name]
    return {
        "model": str(files),
        "weights": engine.formats[weights],
        "threads": threads,
        "max_len": MAX_LEN,
        "kv_tokens": KV_TOKENS,
        "kv_bytes": KV_TOKENS * roofs.kv_token_bytes(CONFIGS[model], kv_bits),
        "vocab": VOCAB,
        **({"kv": engine.kv8} if kv_bits == 8 else {}),
    }
