# SPDX-License-Identifier: MIT
"""The engine's decode loop on a GPU: DeepSeek-V2-Lite's shape, random weights, beside its floor.

    python benchmarks/gpu_engine.py [--steps 64] [--output FILE]      one GPU of 40 GiB or more
    python benchmarks/gpu_engine.py --device cpu --tiny               the same code, anywhere

Everything of a step but the scheduler: plans go to `Runner.launch` one step ahead, ids come back as
results, and each next plan takes its ids from the device. The KV of the contexts is random numbers:
no prompt is computed. Each step runs captured and uncaptured, which must give the same ids. The
floor is the bytes of a step (weights of the experts that so many tokens choose on average, KV, the
head) over the measured stream rate. Without a GPU it says what is missing and ends with status 2.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.machine import describe, lacks
from gpu.timing import stream_rate
from torch import nn

from tokenspeed.config import EngineConfig
from tokenspeed.engine.part import Part, assemble_part
from tokenspeed.execution import plan_view as pv
from tokenspeed.execution.runner import InFlight, Runner
from tokenspeed.execution.sampler import Sequence
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.layers.layer import Layer
from tokenspeed.models.build import Ranks, plan_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.spmd.localise import localise

PAGE = 64
SHAPE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
BATCHES, CONTEXTS = (1, 8, 32), (1024, 51200)
TINY_BATCHES, TINY_CONTEXTS = (1, 3), (60, 130)


@dataclass(frozen=True)
class Case:
    """`batch` requests that stand at `context` tokens."""

    batch: int
    context: int
    steps: int

    @property
    def pages_each(self) -> int:
        return -(-(self.context + self.steps + 2) // PAGE)


def random_model(values: dict[str, Any], device: torch.device, max_len: int) -> CausalLM:
    """Made on the device: no file holds these weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        model, _, plan = plan_model(Path(folder), None, device, max_len, Ranks())
    model.spmd = localise(model, plan)
    torch.manual_seed(0)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for module in layers:
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            made = made.uniform_(0.8, 1.2) if made.dim() == 1 else made.normal_(0, 0.03)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
    for module in layers:
        module.settle()
    for module in layers:
        module.pack_weights()
    return model


def step_bytes(values: dict[str, Any], case: Case, kv_bytes_per_token: int) -> float:
    """What one step must read at least: each weight once, and every key and value."""
    v = values
    hidden, heads, latent = v["hidden_size"], v["num_attention_heads"], v["kv_lora_rank"]
    rope, nope, value = v["qk_rope_head_dim"], v["qk_nope_head_dim"], v["v_head_dim"]
    attention = hidden * heads * (nope + rope) + hidden * (latent + rope)
    attention += latent * heads * (nope + value) + heads * value * hidden
    experts, chosen = v["n_routed_experts"], v["num_experts_per_tok"]
    expert = 3 * hidden * v["moe_intermediate_size"]
    distinct = experts * (1 - (1 - chosen / experts) ** case.batch)
    sparse = expert * (distinct + v["n_shared_experts"]) + experts * hidden
    dense, layers = v["first_k_dense_replace"], v["num_hidden_layers"]
    weights = layers * attention + (layers - dense) * sparse + v["vocab_size"] * hidden
    weights += dense * 3 * hidden * v["intermediate_size"]
    return float(2 * weights + case.batch * case.context * kv_bytes_per_token)


def first_plan(case: Case) -> pv.PlanView:
    """Seats every request, gives it its pages, and feeds one token."""
    each = case.pages_each
    deltas = [(0, i // each, i % each, i) for i in range(case.batch * each)]
    binds = [(i, i, 0, case.context) for i in range(case.batch)]
    return plan_of(case, 0, np.arange(case.batch), deltas, binds)


def plan_of(
    case: Case,
    step: int,
    tokens: Any,
    deltas: Any = (),
    binds: Any = (),
) -> pv.PlanView:
    """Every request decodes one token at `context + step`."""
    rows = [(i, pv.ROW_SAMPLE, case.context + step, 1, 0, i, 0) for i in range(case.batch)]
    sections = [rows, tokens, deltas, (), binds]
    body = [np.array(section, np.int32).ravel() for section in sections]
    header = np.zeros(pv.HEADER_WORDS, np.int32)
    size = pv.HEADER_WORDS + sum(len(words) for words in body)
    header[:5] = pv.PLAN_MAGIC, pv.LAYOUT_VERSION, size, step, 0
    header[5:10] = [len(section) for section in sections]
    header[10] = True  # they only decode
    return pv.PlanView(np.concatenate([header, *body]))


def ids_of(flight: InFlight, batch: int) -> list[int]:
    output = flight.result()[0]
    if output is None:
        raise RuntimeError("the step gave nothing")
    ids: list[int] = output.words[-batch:].tolist()
    return ids


def decode(part: Part, case: Case) -> tuple[list[list[int]], list[float]]:
    """The ids of every step, and the seconds between one step's results and the next one's."""
    runner = Runner(part.runner, max_num_seqs=case.batch, threaded=True)
    params = SamplingParams(temperature=0.0, max_tokens=case.steps + 2)
    prompt = np.zeros(case.context, np.int32)
    for i in range(case.batch):
        runner.add(i, Sequence(prompt, params, [], i))
    ids, arrived = [], []
    flight = runner.launch([first_plan(case)])
    ahead = [pv.TOKEN_FROM_DEVICE] * case.batch
    for step in range(1, case.steps + 1):
        following = runner.launch([plan_of(case, step, ahead)])
        ids.append(ids_of(flight, case.batch))
        arrived.append(time.perf_counter())
        flight = following
    ids.append(ids_of(flight, case.batch))
    runner.close()
    return ids, [b - a for a, b in itertools.pairwise(arrived)]


def run_case(model: CausalLM, values: dict[str, Any], case: Case, rate: float) -> dict[str, Any]:
    """One batch at one context, captured and not."""
    found: dict[str, Any] = {"batch": case.batch, "context": case.context}
    ids: dict[str, list[list[int]]] = {}
    for name, eager in (("captured", False), ("eager", True)):
        config = EngineConfig.of(
            max_num_seqs=case.batch,
            page_size=PAGE,
            num_pages=case.batch * case.pages_each,
            max_model_len=case.pages_each * PAGE,
            overlap_depth=1,
            enforce_eager=eager,
        )
        part = assemble_part(config, model)
        generator = torch.Generator(model.target.device).manual_seed(1)
        for tensors in part.runner.cache.layers:
            for tensor in tensors:
                tensor.normal_(0, 0.5, generator=generator)
        ids[name], times = decode(part, case)
        found[f"{name}_ms"] = round(statistics.median(times) * 1e3, 4)
        found[f"{name}_p90_ms"] = round(sorted(times)[len(times) * 9 // 10] * 1e3, 4)
        kv = sum(spec.bytes_per_token() for spec in model.cache_specs())
        del part
        if model.target.device.type == "cuda":
            torch.cuda.empty_cache()
    floor = step_bytes(values, case, kv) / rate
    pairs = list(zip(ids["captured"], ids["eager"], strict=True))
    found["floor_ms"] = round(floor * 1e3, 4)
    found["times_floor"] = round(found["captured_ms"] / (floor * 1e3), 3)
    found["tokens_s"] = round(case.batch / found["captured_ms"] * 1e3, 1)
    found["same_ids"] = sum(a == b for a, b in pairs)
    found["steps"] = len(pairs)
    return found


def host_rate(size: int = 1 << 28) -> float:
    """Bytes per second that this CPU reads, roughly."""
    source = torch.ones(size // 4)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        source.sum()
        times.append(time.perf_counter() - begin)
    return size / min(times)


def run(options: argparse.Namespace) -> int:
    machine = describe()
    print(json.dumps(machine))
    if options.device == "cuda":
        for reason in lacks():
            print(f"lacking: {reason}")
        if not torch.cuda.is_available():
            return 2
    values = SHAPE | (TINY if options.tiny else {})
    batches, contexts = (TINY_BATCHES, TINY_CONTEXTS) if options.tiny else (BATCHES, CONTEXTS)
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", 0)
    cases = [Case(b, c, options.steps) for c in contexts for b in batches]
    rate = host_rate() if options.device == "cpu" else stream_rate()
    model = random_model(values, device, max(case.pages_each for case in cases) * PAGE)
    print(f"stream {rate / 1e12:.3f} TB/s")
    print(
        f"{'batch':>5} {'context':>8} {'captured ms':>12} {'eager ms':>9} {'floor ms':>9} {'x':>6}"
    )
    rows = []
    for case in cases:
        rows.append(row := run_case(model, values, case, rate))
        figures = f"{row['captured_ms']:12.3f} {row['eager_ms']:9.3f} {row['floor_ms']:9.3f}"
        same = f"{row['same_ids']} of {row['steps']} steps with the same ids"
        print(f"{case.batch:5} {case.context:8} {figures} {row['times_floor']:6.2f}  {same}")
    result = {"machine": machine, "stream_bytes_s": rate, "tiny": options.tiny, "rows": rows}
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["same_ids"] == row["steps"] for row in rows) else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a shape that runs anywhere")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--output", type=Path, help="a file for the figures, JSON")
    sys.exit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
