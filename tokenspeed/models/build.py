# SPDX-License-Identifier: MIT
"""From a folder to a model that can run: configuration, modules, placements, weights.

Refuses to know where the folder came from (`models/hub.py`).
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tokenspeed.errors import ModelLoadError
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.checkpoint import Checkpoint
from tokenspeed.models.hf_config import HfConfig, architecture, read_json, text_config
from tokenspeed.models.loader import Block, LoadReport, TensorNames, load_weights
from tokenspeed.models.registry import find_architecture
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.placement import Mesh

_log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}


def load_model(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> CausalLM:
    """Builds the model in `folder` and fills it. `dtype` None takes that of config.json.

    Raises `ModelLoadError` for whatever is wrong with the folder, before weights are allocated.
    """
    start = time.perf_counter()
    model, report = load_with_report(folder, dtype, device, max_model_len, progress)
    _log.info(
        "loaded %d tensors, %.1f MB, in %.1f s; %d set aside",
        report.num_tensors,
        report.num_bytes / 1e6,
        time.perf_counter() - start,
        len(report.set_aside),
    )
    return model


def load_with_report(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[CausalLM, LoadReport]:
    """As `load_model`, and what was read."""
    outer = HfConfig(read_json(folder / "config.json"))
    config = text_config(outer)
    found = find_architecture(architecture(outer))
    block = _fp8_block(config if config.has("quantization_config") else outer)
    dtype = dtype or _stated_dtype(config, outer)
    try:
        model = found.model.from_config(dict(config.values), dtype, device, max_model_len)
    except (RuntimeError, OverflowError) as error:  # torch cannot even describe such a tensor
        raise ModelLoadError(f"{folder}: config.json asks for impossible sizes: {error}") from error
    plan = compile_model(model, Mesh())
    names = TensorNames(found.prefix, found.other, block)
    report = load_weights(model, plan, Checkpoint(folder), names, progress)
    return model, report


def _stated_dtype(config: HfConfig, outer: HfConfig) -> torch.dtype:
    """config.json's dtype; float16 is served as bfloat16, an unstated one as bfloat16."""
    for part in (config, outer):
        for key in ("dtype", "torch_dtype"):
            if part.has(key):
                return DTYPES[part.word(key, tuple(DTYPES))]
    return torch.bfloat16


def _fp8_block(config: HfConfig) -> Block | None:
    """The block size of an FP8 checkpoint, None without quantisation. Others are refused."""
    quantization = config.section("quantization_config")
    if quantization is None:
        return None
    quantization.word("quant_method", ("fp8",))
    quantization.word("fmt", ("e4m3",), "e4m3")
    sizes = quantization.integers("weight_block_size")
    if len(sizes) != 2 or min(sizes) < 1:
        raise quantization.error(
            "weight_block_size",
            f"must be two positive sizes, is {sizes}; only block-quantised FP8 is supported",
        )
    return sizes[0], sizes[1]
