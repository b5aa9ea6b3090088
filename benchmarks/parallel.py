# SPDX-License-Identifier: MIT
"""What many ranks cost beside the computing: a step's time outside kernels and collectives, the
plan's way to the other ranks, and the compiled collectives beside Megatron-style ones.

    python benchmarks/parallel.py [--batch 16] [--steps 100] [--json FILE]

Steps: a dense model of random weights whose decode step takes about 10 ms here, on one rank and on
two processes; every kernel of the registry and every call of a group is timed on rank 0, and what
is left of `Engine.step` is Python, the scheduler and the sampler's bookkeeping. Broadcast: a real
step message of 256 decoding rows, from the moment it is sent to the moment a reader that slept has
it. Megatron-style: two all-reduces a layer, one for the embedding, a gather of the logits
(arXiv:1909.08053, section 3). Knows no GPU.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from groups import broadcast_seconds
from safetensors.torch import save_file

from tokenspeed._scheduler import Scheduler
from tokenspeed.config import EngineConfig
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.engine.ranks import muster
from tokenspeed.engine.ranks.wires import make_communicator
from tokenspeed.execution.plan_view import PlanView
from tokenspeed.execution.recorders import CpuGraph, CpuRecorder, Outputs
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.execution.step_message import encode_step
from tokenspeed.kernels.registry import Ask, Kernel, Registry
from tokenspeed.layers import layer
from tokenspeed.models.build import build_model
from tokenspeed.spmd.collectives import Variant
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.mesh import Mesh

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
PUBLISHED = ("deepseek-v3", "qwen3-235b", "kimi-k2.6", "minimax-m2")
ASSETS = Path(__file__).resolve().parents[1] / "tokenspeed" / "assets"


class Clock:
    """Seconds inside the calls it wraps; collectives inside fused kernels count as collectives."""

    def __init__(self) -> None:
        self.kernels, self.fused, self.collectives, self.inside = 0.0, 0.0, 0.0, 0.0
        self.calls = 0
        self._in_fused = False

    def kernel(self, call: Callable[..., Any]) -> Callable[..., Any]:
        now = time.perf_counter

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = now()
            result = call(*arguments, **named)
            self.kernels += now() - begin
            self.calls += 1
            return result

        timed.__wrapped__ = call  # type: ignore[attr-defined]
        return timed

    def fused_kernel(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self._in_fused, begin = True, time.perf_counter()
            result = call(*arguments)
            self.fused += time.perf_counter() - begin
            self._in_fused = False
            self.calls += 1
            return result

        return timed

    def collective(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = call(*arguments)
            spent = time.perf_counter() - begin
            self.collectives += spent
            self.inside += spent if self._in_fused else 0.0
            self.calls += 1
            return result

        return timed

    def reset(self) -> None:
        self.kernels = self.fused = self.collectives = self.inside = 0.0
        self.calls = 0


class TimedGroup:
    """A group whose every call is on the clock."""

    def __init__(self, group: Any, clock: Clock) -> None:
        self.ranks, self.index = group.ranks, group.index
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
            setattr(self, name, clock.collective(getattr(group, name)))


class TimedCommunicator:
    def __init__(self, inner: Any, clock: Clock) -> None:
        self.rank, self.num_ranks = inner.rank, inner.num_ranks
        self._inner, self._clock = inner, clock

    def group(self, partition: Any) -> Any:
        return TimedGroup(self._inner.group(partition), self._clock)

    def close(self) -> None:
        self._inner.close()


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Kernels chosen, communicators made and steps captured inside are on the clock."""
    select, make = Registry.select, make_communicator
    pack_of, capture = vars(layer)["pack_of"], CpuRecorder.capture

    def timed_capture(self: CpuRecorder, body: Callable[[], Outputs], *size: int) -> CpuGraph:
        graph = capture(self, body, *size)
        vars(graph)["replay"] = clock.kernel(graph.replay)
        return graph

    def timed_select(self: Registry, ask: Ask, backend: str | None = None) -> Kernel:
        wrap = clock.fused_kernel if "reduce" in ask.op else clock.kernel
        return wrap(select(self, ask, backend))

    Registry.select = timed_select  # type: ignore[method-assign]
    CpuRecorder.capture = timed_capture  # type: ignore[method-assign, assignment]
    vars(layer)["pack_of"] = lambda kernel: pack_of(getattr(kernel, "__wrapped__", kernel))
    vars(muster)["make_communicator"] = lambda *a: TimedCommunicator(make(*a), clock)
    try:
        yield
    finally:
        Registry.select = select  # type: ignore[method-assign]
        CpuRecorder.capture = capture  # type: ignore[method-assign]
        vars(layer)["pack_of"] = pack_of
        vars(muster)["make_communicator"] = make


def write_model(folder: Path) -> None:
    """Random weights of SHAPE."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    model, _ = build_model(folder, None, torch.device("cpu"))
    torch.manual_seed(0)
    tensors = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        for source in getattr(module, "sources", lambda: ())():
            name = f"{parent}.{source.name}" if parent else source.name
            tensors[name] = torch.randn(source.shape, dtype=torch.bfloat16) * 0.02
    save_file(tensors, folder / "model.safetensors")


def measure_step(folder: Path, num_ranks: int, batch: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a decode step and of its parts on rank 0, medians over the steps."""
    clock = Clock()
    with timed(clock):
        engine = decoding_engine(folder, num_ranks, batch, steps)
    totals, kernels, collectives = [], [], []
    for _ in range(steps):
        clock.reset()
        begin = time.perf_counter()
        engine.step()
        totals.append(time.perf_counter() - begin)
        kernels.append(clock.kernels + clock.fused - clock.inside)
        collectives.append(clock.collectives)
    engine.close()
    plain = plain_step(folder, num_ranks, batch, steps)
    rest = [t - k - c for t, k, c in zip(totals, kernels, collectives, strict=True)]
    row = {
        "step_ms": plain,
        "timed_step_ms": statistics.median(totals),
        "kernels_ms": statistics.median(kernels),
        "collectives_ms": statistics.median(collectives),
        "outside_ms": statistics.median(rest),
    }
    shown = {name: round(value * 1e3, 3) for name, value in row.items()}
    return {"ranks": num_ranks, "calls": clock.calls, **shown}


def plain_step(folder: Path, num_ranks: int, batch: int, steps: int) -> float:
    """Seconds of the same step without a clock in it."""
    engine = decoding_engine(folder, num_ranks, batch, steps)
    totals = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        totals.append(time.perf_counter() - begin)
    engine.close()
    return statistics.median(totals)


def decoding_engine(folder: Path, num_ranks: int, batch: int, steps: int) -> Engine:
    """All requests past their prompts, with room for `steps` more tokens each."""
    config = EngineConfig.of(
        model=str(folder),
        tensor_parallel_size=num_ranks,
        max_model_len=1024,
        num_pages=batch * 16,
        speculative_config='{"method": "off"}',
    )
    engine = build_engine(config, folder=folder)
    for i in range(batch):
        params = SamplingParams(max_tokens=steps + 20, temperature=0.0, ignore_eos=True)
        engine.add_request(GenerateRequest(i + 1, list(range(i + 1, i + 33)), params))
    for _ in range(10):
        engine.step()
    return engine


def step_message(num_rows: int) -> bytes:
    """What rank 0 sends for so many decoding requests."""
    scheduler = Scheduler(
        num_pages=num_rows * 4,
        page_size=64,
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows * 40,
        max_model_len=256,
    )
    for i in range(num_rows):
        scheduler.submit(i, np.arange(i, i + 32, dtype=np.int32), max_tokens=8)
    plan = scheduler.next_plan()
    if plan is None:
        raise RuntimeError("no plan")
    return encode_step([PlanView(plan)], {})


def megatron_rows(name: str, tp: int) -> dict[str, Any]:
    """Our collectives of a published model beside Megatron-style ones."""
    folder = ASSETS / "models"
    config = json.loads((folder / f"{name}.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)  # what is moved are activations
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "config.json").write_text(json.dumps(config))
        model, _ = build_model(Path(made), torch.bfloat16, torch.device("cpu"), 8192)
    plan = compile_model(model, Mesh(tp=tp), variant=Variant())
    rows = plan.collectives(0)
    hidden, layers = model.config.hidden_size, model.config.num_layers
    stream = [row for row in rows if row.kind == "all_reduce" and row.bytes_per_row > 16]
    small = [row for row in rows if row.kind == "all_reduce" and row.bytes_per_row <= 16]
    ours = sum(row.bytes_per_row for row in rows if row.rows != "sampled")
    theirs = (2 * layers + 1) * hidden * 2
    return {
        "model": name,
        "all_reduces": len(stream),
        "megatron_all_reduces": 2 * layers + 1,
        "norm_statistics": len(small),
        "bytes_per_token": round(ours),
        "megatron_bytes_per_token": theirs,
        "gathers_of_logits": sum(row.rows == "sampled" for row in rows),
    }


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2000, help="broadcasts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in an engine process: kernels have threads of their own
    with tempfile.TemporaryDirectory() as made:
        write_model(Path(made))
        steps = [measure_step(Path(made), n, options.batch, options.steps) for n in (1, 2)]
    print(f"{'ranks':>5} {'step':>8} {'kernels':>8} {'collect.':>8} {'outside':>8} {'of 10 ms':>8}")
    for row in steps:
        parts = (row[k] for k in ("step_ms", "kernels_ms", "collectives_ms", "outside_ms"))
        figures = " ".join(f"{value:8.3f}" for value in parts)
        print(f"{row['ranks']:>5} {figures} {row['outside_ms'] / 10:8.1%}")
    message = step_message(256)
    broadcast = {}
    for name, size, interval in (("warm", len(message), 0.0), ("asleep", len(message), 0.002)):
        times = broadcast_seconds(1, size, options.repeats, interval)
        p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
        broadcast[name] = {"bytes": size, "p50_us": round(p50, 1), "p99_us": round(p99, 1)}
        print(f"broadcast of {size} bytes, reader {name}: p50 {p50:.1f} us, p99 {p99:.1f} us")
    models = [megatron_rows(name, 8) for name in PUBLISHED]
    for m in models:
        print(
            f"{m['model']:>12}: {m['all_reduces']} all-reduces, {m['bytes_per_token']} B/token; "
            f"Megatron-style {m['megatron_all_reduces']}, {m['megatron_bytes_per_token']}"
        )
    result = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "batch": options.batch,
        "steps": steps,
        "broadcast": broadcast,
        "collectives_tp8": models,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
