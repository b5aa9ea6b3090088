# SPDX-License-Identifier: MIT
"""The simulator against reality: the demo model's engine serves what the simulator predicts.

First the engine serves a workload of its own, and the times of its steps make the profile. Then
three others, for real and simulated with it: sessions of the published shape,
single requests of random lengths, generated agents (both scaled down to the demo's context). Client
and engine are in one process, and the same `Clients` send to both. The single requests, whose
streams are the longest, are played once more with a floor at 60% of the rate that they had without:
what pacing does then is compared too.

`--clock cpu` counts the time that the one thread computes, and skips the rest: what else the
machine does counts little then. `--write-profile` keeps the profile for `tokenspeed simulate`.

    python benchmarks/simulation.py [--clock wall|cpu] [--threads 1] [--size 1.0] [--json FILE]
        [--write-profile FILE]
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed import _cpu
from tokenspeed._policy import FEATURES
from tokenspeed.bench.windows import Attainment
from tokenspeed.bench.workloads import fixed, generated, published
from tokenspeed.config import EngineConfig
from tokenspeed.engine import engine as engine_module
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.engine.step_times import StepTimes
from tokenspeed.execution.plan_view import Plans
from tokenspeed.execution.runner import InFlight
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.simulation.clients import Clients, Sending
from tokenspeed.simulation.device_profile import (
    PREFILL_FEATURES,
    LinearProfile,
    StepShape,
    shape_of,
)
from tokenspeed.simulation.options import SimulationOptions
from tokenspeed.simulation.sessions import Workload, condense
from tokenspeed.simulation.simulate import Simulation

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
CONTEXT, PAGE, PAGES, SEQS, BUDGET = 4096, 16, 8192, 16, 512
FIRST_ID, NUM_IDS = 10, 4000  # of the demo's vocabulary
EXPERTS, PER_TOKEN = 8, 2
LEARNT = (
    *("step", "decode_rows", "prefill_tokens", "context_thousands", "experts"),
    *("prefills", "prefill_context_millions"),
    *PREFILL_FEATURES,
)
ROUNDS = 8
FLOOR_SHARE = 0.6  # of the rate without a floor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """A workload and how it is played."""

    name: str
    workload: Workload
    concurrency: int
    time_scale: float = 1.0
    tps_floor: float | None = None


@dataclass
class Figures:
    """Of one run: per second of the run, and per stream."""

    duration_s: float
    num_requests: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    tps_p50: float
    ttft_p50_s: float
    ttft_p90_s: float
    hit_rate: float
    attainment: float | None  # share of stream-seconds at or above the floor, if there is one


@dataclass
class Stream:
    """What became of a request."""

    sending: Sending
    times_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0


class Noting:
    """The engine's runner, and what the last step was."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.shapes: list[StepShape] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, plans: Plans) -> InFlight:
        self.shapes = [shape_of(plan) for plan in plans if plan is not None]
        flight: InFlight = self._runner.launch(plans)
        return flight


class RealRun:
    """An engine, its clock, and what its steps took."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine, self._clock = engine, clock
        self._noting = Noting(engine._runner)
        engine._runner = self._noting
        self._num_sent = 1000
        self.steps: list[tuple[list[StepShape], float]] = []

    def play(self, load: Load) -> Figures:
        """Serves the workload from an empty cache. Idle time is skipped, not slept."""
        self._engine.flush_cache()
        clients = Clients(
            load.workload.sessions, concurrency=load.concurrency, time_scale=load.time_scale
        )
        live: dict[int, Stream] = {}
        over: list[Stream] = []
        zero = before_s = self._clock()
        while live or clients.next_s is not None:
            now_s = self._clock() - zero
            if not live and clients.next_s is not None and clients.next_s > now_s:
                zero -= clients.next_s - now_s
                now_s = clients.next_s
                before_s = self._clock()
            for sending in clients.due(now_s):
                begin_s = self._clock()
                request = self._request(load, sending)
                spent_s = self._clock() - begin_s  # by the client, who has a machine of its own
                zero += spent_s
                before_s += spent_s
                live[request.request_id] = Stream(sending)
                self._engine.add_request(request)
            outputs = self._engine.step()
            after_s = self._clock()
            self.steps.append((self._noting.shapes, after_s - before_s))
            before_s = after_s
            for output in outputs:
                stream = live[output.request_id]
                stream.times_s += [after_s - zero] * len(output.token_ids)
                stream.cached_tokens = output.num_cached_tokens
                if output.finish_reason is not None:
                    over.append(live.pop(output.request_id))
                    clients.over(stream.sending.session, after_s - zero)
        return figures(load, over, self._clock() - zero)

    def _request(self, load: Load, sending: Sending) -> GenerateRequest:
        turn = load.workload.sessions[sending.session].turns[sending.number]
        self._num_sent += 1
        params = SamplingParams(max_tokens=turn.output_tokens)
        return GenerateRequest(self._num_sent, real_ids(sending.prompt), params)


def real_ids(prompt: NDArray[np.int32]) -> list[int]:
    """Ids of the vocabulary; equal prefixes stay equal, and others differ."""
    mixed = prompt.astype(np.int64) * 2654435761 + np.arange(len(prompt)) * 40503
    ids: list[int] = (mixed % 1_000_003 % NUM_IDS + FIRST_ID).tolist()
    return ids


def figures(load: Load, streams: Sequence[Stream], duration_s: float) -> Figures:
    outputs = sum(len(stream.times_s) for stream in streams)
    inputs = sum(len(stream.sending.prompt) for stream in streams)
    cached = sum(stream.cached_tokens for stream in streams)
    ttfts = [stream.times_s[0] - stream.sending.sent_s for stream in streams]
    rates = [
        (len(s.times_s) - 1) / (s.times_s[-1] - s.times_s[0]) for s in streams if len(s.times_s) > 4
    ]
    p50, p90 = np.percentile(ttfts, [50, 90]).tolist()
    return Figures(
        duration_s=duration_s,
        num_requests=len(streams),
        output_tokens_per_s=outputs / duration_s,
        total_tokens_per_s=(inputs + outputs) / duration_s,
        tps_p50=float(np.median(rates)) if rates else 0.0,
        ttft_p50_s=p50,
        ttft_p90_s=p90,
        hit_rate=cached / inputs,
        attainment=None if load.tps_floor is None else attained(streams, load.tps_floor),
    )


def attained(streams: Sequence[Stream], floor: float) -> float:
    kept = Attainment([floor])
    for stream in streams:
        kept.add_tokens(stream.times_s)
    return kept.share(floor)


def learn(steps: Sequence[tuple[list[StepShape], float]]) -> LinearProfile:
    """The profile that explains these steps."""
    plain = LinearProfile("demo on this CPU", {"step": 1.0}, EXPERTS, PER_TOKEN)
    told = [plain.amounts(shapes) for shapes, _ in steps]
    amounts = np.array([[one.get(name, 0.0) for name in LEARNT] for one in told])
    seconds = np.array([took_s for _, took_s in steps])
    found = least_errors(amounts, seconds)
    errors = np.abs(amounts @ found / seconds - 1)
    machine: dict[str, Any] = {"machine": platform.machine(), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, "median_error": round(float(np.median(errors)), 4)}
    coefficients = dict(zip(LEARNT, found.tolist(), strict=True))
    coefficients["step"] = max(coefficients["step"], 1e-6)
    return replace(plain, coefficients=coefficients, machine=machine)


def least_errors(amounts: Array, seconds: Array) -> Array:
    """[features] coefficients >= 0 of least relative errors, the largest of which count less
    (Huber's weights); a feature whose coefficient would be negative is left out."""
    weights = np.ones(len(seconds))
    found = np.zeros(amounts.shape[1])
    for _ in range(ROUNDS):
        used = list(range(amounts.shape[1]))
        while True:
            rows = amounts[:, used] * (weights / seconds)[:, None]
            solved = np.linalg.lstsq(rows, weights, rcond=None)[0]
            if (solved >= 0).all():
                break
            del used[int(np.argmin(solved * np.abs(rows).mean(0)))]
        found = np.zeros(amounts.shape[1])
        found[used] = solved
        errors = np.abs(amounts @ found / seconds - 1)
        weights = np.sqrt(np.minimum(1.0, 1.345 * np.median(errors) / np.maximum(errors, 1e-9)))
    return found


def learnt(steps: Sequence[tuple[list[StepShape], float]], profile: LinearProfile) -> StepTimes:
    """As an engine's that has served before."""
    times = StepTimes(profile.experts)
    for shapes, seconds in steps:
        told = profile.amounts(shapes)
        times.model.observe(np.array([told.get(name, 0.0) for name in FEATURES]), seconds)
    return times


def simulated(load: Load, profile: LinearProfile, times: StepTimes) -> Figures:
    options = SimulationOptions(
        num_pages=PAGES,
        max_model_len=CONTEXT,
        page_size=PAGE,
        max_num_seqs=SEQS,
        max_num_batched_tokens=BUDGET,
        concurrency=load.concurrency,
        time_scale=load.time_scale,
        tps_floor=load.tps_floor,
    )
    run = Simulation(load.workload, profile, options, times=times)
    streams = []
    for one in run.outcomes():
        turn = one.session.turns[one.number]
        prompt = np.empty(turn.input_tokens, np.int32)  # only its length counts
        sending = Sending(0, one.number, one.sent_s, prompt, None)
        streams.append(Stream(sending, one.token_times_s.tolist(), one.cached_tokens))
    return figures(load, streams, run.machine.now_s)


def fitting(workload: Workload) -> Workload:
    """The sessions whose turns fit into the demo's context."""
    most = CONTEXT - 1
    sessions = tuple(
        session
        for session in workload.sessions
        if all(turn.input_tokens + turn.output_tokens <= most for turn in session.turns)
    )
    return Workload(workload.name, workload.seed, workload.scale, sessions)


def loads(size: float) -> tuple[list[Load], list[Load]]:
    """Some to learn from, and those to predict."""

    def count(number: int) -> int:
        return max(2, round(number * size))

    lessons = condense(fixed.make(requests=count(40), input_tokens=700, output_tokens=60,
                                  range_ratio=0.9, seed=9))  # fmt: skip
    turns = condense(published.make(sessions=count(8), scale=20.0, growth=2000, seed=9))
    shape = condense(published.make(sessions=count(10), scale=32.0))
    random = condense(fixed.make(requests=count(48), input_tokens=600, range_ratio=0.5, seed=1))
    agents = condense(generated.make(sessions=count(24), scale=64.0, seed=2))
    learning = [Load("lessons", fitting(lessons), 6), Load("turns", fitting(turns), 3)]
    return learning, [
        Load("published", fitting(shape), 4),
        Load("random", fitting(random), 8),
        Load("agents", fitting(agents), 6, time_scale=0.001),
    ]


def real_run(clock: Callable[[], float], warming: Load, tps_floor: float | None = None) -> RealRun:
    """An engine that has served something, whose pacing goes by the same clock."""
    config = EngineConfig.of(
        model="demo",
        device="cpu",
        num_pages=PAGES,
        page_size=PAGE,
        max_num_seqs=SEQS,
        max_num_batched_tokens=BUDGET,
        tps_floor=tps_floor,
        speculative_config='{"method": "off"}',
    )
    vars(engine_module)["time"] = SimpleNamespace(monotonic=clock)
    real = RealRun(build_engine(config), clock)
    real.play(warming)
    real.steps.clear()
    return real


def median_of(runs: Sequence[Figures]) -> Figures:
    return sorted(runs, key=lambda run: run.duration_s)[len(runs) // 2]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    _cpu.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]
    lessons, others = loads(args.size)
    real = real_run(clock, lessons[0])
    steps: list[tuple[list[StepShape], float]] = []
    free = others[1]
    floor = round(FLOOR_SHARE * real.play(free).tps_p50)
    real.steps.clear()
    paced = replace(free, name=f"{free.name}, floor {floor}", tps_floor=float(floor))
    with_floor = real_run(clock, lessons[0], float(floor))
    runs: dict[str, list[Figures]] = {load.name: [] for load in (*others, paced)}
    for _ in range(args.repeats):  # in turns, so that a change of the machine hits all alike
        for load in lessons:
            real.play(load)
        steps += real.steps
        for load in others:
            runs[load.name].append(real.play(load))
        real.steps.clear()
        runs[paced.name].append(with_floor.play(paced))
    profile = learn(steps)
    if args.write_profile:
        args.write_profile.write_text(json.dumps(asdict(profile), indent=1) + "\n")
    found: dict[str, Any] = {"profile": asdict(profile)}
    for load in (*others, paced):
        middle = asdict(median_of(runs[load.name]))
        foretold = simulated(load, profile, learnt(steps, profile))
        found[load.name] = {"real": middle, "simulated": asdict(foretold)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=float, default=1.0, help="of the workloads")
    parser.add_argument("--repeats", type=int, default=3, help="of the real runs")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--write-profile", type=Path, help="for `tokenspeed simulate --profile`")
    args = parser.parse_args()
    if args.repeats % 2 == 0:
        parser.error("--repeats must be odd: the median run is compared")
    if args.clock == "cpu" and args.threads > 1:
        parser.error("--clock cpu adds up all threads: it needs --threads 1")
    found = measure(args)
    print(f"{'workload':24}{'figure':24}{'real':>12}{'simulated':>12}{'error':>9}")
    for name, both in found.items():
        if name == "profile":
            continue
        for figure, real in both["real"].items():
            predicted = both["simulated"][figure]
            if real is None:
                continue
            error = f"{predicted / real - 1:+.1%}" if real else ""
            print(f"{name:24}{figure:24}{real:12.4g}{predicted:12.4g}{error:>9}")
    options = {"clock": args.clock, "threads": args.threads, "size": args.size}
    line = json.dumps({"benchmark": "simulation", **options, **found})
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
