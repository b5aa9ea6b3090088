# SPDX-License-Identifier: MIT
"""What a figure could be at most: bytes that a step must read, operations that a prompt must do.

Reads a model's configuration and the measured rates of `workers/measure_roofs.py`; no engine.
Weights count once a step, those of experts only where a token goes there; the embedding's rows,
activations and what a kernel reads twice do not count.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from peers.checkpoints import shapes
from peers.worker import WORKERS

BITS = {"bf16": 16.0, "int8": 8.0 + 16 / 32, "int4": 4.0 + 16 / 32}  # a scale for 32 weights


@dataclass(frozen=True)
class Roofs:
    """Measured on this machine, with the threads that engines have."""

    read_gb_s: float
    bf16_tflop_s: float
    int8_top_s: float


def measure(threads: int) -> Roofs:
    command = [sys.executable, str(WORKERS / "measure_roofs.py"), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Roofs(**json.loads(done.stdout.splitlines()[-1]))


def at_most(
    config: dict[str, Any], weights: str, roofs: Roofs, kv_bits: int = 16
) -> dict[str, float]:
    """The most that each rate can be, in tokens per second, by figure."""
    read, kv_bytes = roofs.read_gb_s * 1e9, kv_token_bytes(config, kv_bits)

    def decode(batch: int, context: float) -> float:
        step = weight_bytes(config, weights, batch) + batch * context * kv_bytes
        return batch * read / step

    peak = {"bf16": roofs.bf16_tflop_s}.get(weights, max(roofs.int8_top_s, roofs.bf16_tflop_s))
    return {
        "decode_512": decode(1, 512 + 32),
        "decode_4096": decode(1, 4096 + 16),
        "streams_8": decode(8, 512 + 24),
        "prefill_512": 512 / prompt_seconds(config, 512, peak, roofs),
        "prefill_4096": 4096 / prompt_seconds(config, 4096, peak, roofs),
    }


def weight_bytes(config: dict[str, Any], weights: str, batch: int) -> float:
    """Bytes of weights that one step of `batch` tokens reads, if routing is even."""
    total = 0.0
    for name, shape in shapes(config):
        if "embed_tokens" not in name:
            total += math.prod(shape) * _bits(name, weights) / 8 * _share(config, name, batch)
    return total


def held_bytes(config: dict[str, Any], weights: str) -> float:
    """Bytes of all weights, the embedding's in 16 bits."""
    return sum(
        math.prod(shape) * (16.0 if "embed_tokens" in name else _bits(name, weights)) / 8
        for name, shape in shapes(config)
    )


def _bits(name: str, weights: str) -> float:
    whole = "norm" in name or ".gate." in name
    return 16.0 if whole else BITS[weights]


def _share(config: dict[str, Any], name: str, batch: int) -> float:
    """Of an expert's weights: how likely one of the tokens goes there."""
    if ".experts." not in name:
        return 1.0
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    return float(1 - (1 - share) ** batch)


def kv_token_bytes(config: dict[str, Any], kv_bits: int = 16) -> int:
    """Bytes of KV a token, all layers; scales, where there are any, are not counted."""
    latent = config.get("kv_lora_rank")
    if latent:
        row = latent + config["qk_rope_head_dim"]
    else:
        row = 2 * config["num_key_value_heads"] * config["head_dim"]
    return int(config["num_hidden_layers"] * row * kv_bits // 8)


def prompt_seconds(config: dict[str, Any], tokens: int, peak_tflop_s: float, roofs: Roofs) -> float:
    """Seconds of arithmetic of a prompt: weights at the peak of their kind, attention in bf16."""
    dense: float = sum(
        2 * math.prod(shape) * _share(config, name, 1)
        for name, shape in shapes(config)
        if len(shape) == 2 and "embed_tokens" not in name and "lm_head" not in name
    )
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    if "kv_lora_rank" in config:
        sizes = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
        row = heads * sum(sizes)
    else:
        row = heads * 2 * config["head_dim"]
    attention = layers * row * tokens**2  # two operations, half of the square
    seconds: float = (dense * tokens / peak_tflop_s + attention / roofs.bf16_tflop_s) / 1e12
    return seconds
