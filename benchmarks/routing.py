# SPDX-License-Identifier: MIT
"""What the rule of `engine/routing.py` does for coding agents, simulated: no model, no clock.

Sessions are closed loops: a first prompt, then an answer, a tool's time, some hundred more tokens,
and so on; lengths and times are log-normal, near those of coding agents. An engine makes steps of
at most 2,048 prompt tokens, in order of arrival; a step costs 8 ms, 22 us a prompt token and 0.3 ms
a running request: assumed figures, of no particular machine. Its cache is an LRU of blocks, and so
is the router's record of it. `rule W R` is the rule with W waiting tokens worth a matched one, and
an open request worth R of them; `fixed` leaves each session on the engine it began on, `load` takes
the least load, `turns` goes round.

    python benchmarks/routing.py [--sessions 200 260] [--engines 4] [--seconds 400] [--seeds 3]
"""

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenspeed.engine.routing import REQUEST_TOKENS, WAITING_PER_SAVED, Load, pick

BLOCK = 256  # tokens
CACHE_BLOCKS = 3_000_000 // BLOCK
STEP_TOKENS = 2048
STEP_S, PROMPT_TOKEN_S, RUNNING_S = 8e-3, 22e-6, 3e-4
SYSTEM_TOKENS = (12_000, 15_000, 18_000)  # of three kinds of client
LONGEST = 400_000
RULE = f"rule {WAITING_PER_SAVED} {REQUEST_TOKENS}"
POLICIES = (
    "turns",
    "load",
    "fixed",
    "rule 1 512",
    "rule 8 256",
    RULE,
    "rule 4 1024",
    "rule 8 2048",
)

Block = tuple[int, int]


class Blocks:
    """An LRU of chained blocks; of a chain the end goes first."""

    def __init__(self) -> None:
        self._held: OrderedDict[Block, None] = OrderedDict()

    def match(self, blocks: list[Block]) -> int:
        """Tokens."""
        return BLOCK * sum(1 for _ in itertools.takewhile(self._held.__contains__, blocks))

    def add(self, blocks: list[Block]) -> None:
        for block in reversed(blocks):
            self._held[block] = None
            self._held.move_to_end(block)
        while len(self._held) > CACHE_BLOCKS:
            self._held.popitem(last=False)


@dataclass
class Session:
    number: int
    kind: int
    length: int  # tokens of its next prompt
    steps_left: int
    home: int | None = None

    def blocks(self) -> list[Block]:
        shared = SYSTEM_TOKENS[self.kind] // BLOCK
        return [
            (-1 - self.kind if i < shared else self.number, i) for i in range(self.length // BLOCK)
        ]


@dataclass
class Request:
    session: Session
    arrived_s: float
    blocks: list[Block]
    uncached: int  # as the router believes
    num_out: int
    left: int | None = None  # prompt tokens to compute, once it is looked up
    produced: int = 0
    first_s: float = 0.0


@dataclass
class SimulatedEngine:
    cache: Blocks = field(default_factory=Blocks)
    record: Blocks = field(default_factory=Blocks)  # the router's
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    waiting_tokens: int = 0
    busy: bool = False
    hits: int = 0
    computed: int = 0

    def prefill(self) -> tuple[int, list[Request]]:
        """Fills a step; returns its prompt tokens and the requests whose prompt is done."""
        budget, done = STEP_TOKENS, []
        while self.waiting and budget:
            request = self.waiting[0]
            if request.left is None:
                found = self.cache.match(request.blocks)
                request.left = max(1, request.session.length - found)
                self.hits += found
                self.computed += request.left
            taken = min(budget, request.left)
            request.left -= taken
            budget -= taken
            if request.left == 0:
                self.cache.add(request.blocks)
                self.waiting_tokens -= request.uncached
                done.append(self.waiting.popleft())
        return STEP_TOKENS - budget, done


class Simulation:
    """One policy, one seed."""

    def __init__(self, policy: str, sessions: int, engines: int, seed: int) -> None:
        self._policy, self._rng = policy, random.Random(seed)
        self._engines = [SimulatedEngine() for _ in range(engines)]
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Session | int]] = []
        self._last = -1
        self.ttft: list[float] = []
        self.speeds: list[float] = []
        for _ in range(sessions):
            self._at(self._rng.random() * 60, self._new_session())

    def run(self, seconds: float) -> dict[str, float]:
        while self._events and self._events[0][0] <= seconds:
            now, _, what = heapq.heappop(self._events)
            if isinstance(what, Session):
                self._arrive(now, what)
            else:
                self._step(now, what)
        hits = sum(e.hits for e in self._engines)
        computed = sum(e.computed for e in self._engines)
        return {
            "requests": len(self.ttft),
            "hit_rate": hits / (hits + computed),
            "ttft_mean_s": statistics.mean(self.ttft),
            "ttft_p95_s": statistics.quantiles(self.ttft, n=20)[-1],
            "tps_p50": statistics.median(self.speeds),
            "tps_p5": statistics.quantiles(self.speeds, n=20)[0],
        }

    def _at(self, when: float, what: Session | int) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def _tokens(self, median: float, sigma: float, most: int) -> int:
        return max(1, min(most, int(self._rng.lognormvariate(math.log(median), sigma))))

    def _new_session(self) -> Session:
        kind = self._rng.randrange(len(SYSTEM_TOKENS))
        first = SYSTEM_TOKENS[kind] + self._tokens(20_000, 1.1, 200_000)
        return Session(next(self._numbers), kind, first, self._tokens(30, 0.8, 300))

    def _choose(self, session: Session, blocks: list[Block]) -> tuple[int, int]:
        """The engine and the tokens that it is believed to hold."""
        matched = [engine.record.match(blocks) for engine in self._engines]
        open_now = [len(e.waiting) + len(e.running) for e in self._engines]
        words = self._policy.split()
        per_saved, per_request = map(int, words[1:]) if words[0] == "rule" else (1, 512)
        # As `pick` weighs loads by numbers of its own, the whole cost is given as waiting tokens.
        loads = [
            Load(WAITING_PER_SAVED * (e.waiting_tokens // per_saved + per_request * n))
            for e, n in zip(self._engines, open_now, strict=True)
        ]
        idle = [Load()] * len(loads)
        match words[0]:
            case "turns":
                target = pick([0] * len(loads), idle, self._last)
            case "rule":
                target = pick(matched, loads, self._last)
            case _:
                target = pick([0] * len(loads), loads, self._last)
        if words[0] == "fixed" and session.home is not None:
            target = session.home
        assert target is not None
        self._last = session.home = target
        return target, matched[target]

    def _arrive(self, now: float, session: Session) -> None:
        blocks = session.blocks()
        target, matched = self._choose(session, blocks)
        engine = self._engines[target]
        engine.record.add(blocks)
        uncached = session.length - matched
        engine.waiting_tokens += uncached
        num_out = self._tokens(261, 0.895, 18_000)
        engine.waiting.append(Request(session, now, blocks, uncached, num_out))
        if not engine.busy:
            engine.busy = True
            self._at(now, target)

    def _step(self, now: float, number: int) -> None:
        engine = self._engines[number]
        num_tokens, begun = engine.prefill()
        done = now + STEP_S + PROMPT_TOKEN_S * num_tokens + RUNNING_S * len(engine.running)
        for request in engine.running:
            request.produced += 1
            if request.produced == request.num_out:
                self._answered(done, request)
        engine.running = [r for r in engine.running if r.produced < r.num_out]
        for request in begun:
            request.first_s = done
            self.ttft.append(done - request.arrived_s)
        engine.running += begun
        engine.busy = bool(engine.running or engine.waiting)
        if engine.busy:
            self._at(done, number)

    def _answered(self, now: float, request: Request) -> None:
        session = request.session
        if request.num_out > 20:
            self.speeds.append(request.num_out / (now - request.first_s))
        session.length += request.num_out + self._tokens(894, 1.21, 66_000)
        session.steps_left -= 1
        if session.steps_left <= 0 or session.length > LONGEST:
            session = self._new_session()
        self._at(now + min(120.0, self._rng.lognormvariate(2.0, 1.2)), session)


def mean_of(policy: str, sessions: int, args: argparse.Namespace) -> dict[str, Any]:
    runs = [
        Simulation(policy, sessions, args.engines, seed).run(args.seconds)
        for seed in range(args.seeds)
    ]
    means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    return {"policy": policy, "sessions": sessions} | {n: round(v, 3) for n, v in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[200, 260])
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    args = parser.parse_args()
    runs = []
    for sessions, policy in itertools.product(args.sessions, POLICIES):
        runs.append(mean_of(policy, sessions, args))
        if len(runs) == 1:
            print("  ".join(f"{name:>12}" for name in runs[0]))
        print("  ".join(f"{value:>12}" for value in runs[-1].values()), flush=True)
    line = json.dumps({"benchmark": "routing", "engines": args.engines, "runs": runs})
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
