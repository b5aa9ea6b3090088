# SPDX-License-Identifier: MIT
"""From a folder to a model that can run: configuration, modules, placements, weights.

Refuses to know where the folder came from (`models/hub.py`).
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from tokenspeed.errors import ModelLoadError
from tokenspeed.kernels.quant import Quantization
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.checkpoint import Checkpoint
from tokenspeed.models.hf_config import HfConfig, architecture, read_json, text_config
from tokenspeed.models.load_report import LoadReport, Place
from tokenspeed.models.loader import load_weights
from tokenspeed.models.registry import find_architecture
from tokenspeed.models.tensor_check import Block, TensorNames, wanted_sources
from tokenspeed.spmd.collectives import Variant
from tokenspeed.spmd.compile import SpmdPlan, compile_model
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.localise import localise
from tokenspeed.spmd.mesh import Mesh

_log = logging.getLogger(__name__)
Mtp = Literal["without", "with", "if there"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """Which rank of which mesh a model is built for, and how it reaches the others."""

    mesh: Mesh = field(default_factory=Mesh)
    rank: int = 0
    communicator: Communicator | None = None
    max_tokens: int = 8192  # of one step on one dp rank, for the choice of collectives
    num_redundant_experts: int = 0
    variant: Variant | None = None  # None: by the cost model


def load_model(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None = None,
    progress: Callable[[float], None] | None = None,
    ranks: Ranks | None = None,
    quantization: Quantization | None = None,
    *,
    mtp: Mtp = "without",
) -> CausalLM:
    """Builds the model in `folder` and fills it. `dtype` None takes that of config.json.

    `mtp` says whether `CausalLM.mtp` is wanted; "if there" takes it where the folder has all of
    its tensors.

    Raises `ModelLoadError` for whatever is wrong with the folder, before weights are allocated, and
    `ValueError` for a mesh that the model cannot be divided over.
    """
    start = time.perf_counter()
    model, report = load_with_report(
        folder, dtype, device, max_model_len, progress, ranks, quantization, mtp=mtp
    )
    _log.info("%s in %.1f s", report, time.perf_counter() - start)
    return model


def load_with_report(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None = None,
    progress: Callable[[float], None] | None = None,
    ranks: Ranks | None = None,
    quantization: Quantization | None = None,
    *,
    mtp: Mtp = "without",
) -> tuple[CausalLM, LoadReport]:
    """As `load_model`, and what was read."""
    ranks = ranks or Ranks()
    model, names, plan = plan_model(
        folder, dtype, device, max_model_len, ranks, quantization, mtp=mtp
    )
    model.spmd = localise(model, plan, ranks.rank, ranks.communicator)
    place = Place(ranks.rank, ranks.mesh.num_ranks)
    return model, load_weights(model, Checkpoint(folder), names, progress, place)


def plan_model(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None,
    ranks: Ranks,
    quantization: Quantization | None = None,
    *,
    mtp: Mtp = "without",
) -> tuple[CausalLM, TensorNames, SpmdPlan]:
    """The whole model on the meta device, and how it is divided; the same on every rank."""
    model, names = build_model(folder, dtype, device, max_model_len, quantization)
    if mtp == "with" or (mtp == "if there" and has_mtp(folder)):
        model.add_mtp()
    plan = compile_model(
        model,
        ranks.mesh,
        max_tokens=ranks.max_tokens,
        itemsize=model.target.dtype.itemsize,
        num_redundant_experts=ranks.num_redundant_experts,
        variant=ranks.variant,
    )
    return model, names, plan


def build_model(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None = None,
    quantization: Quantization | None = None,
) -> tuple[CausalLM, TensorNames]:
    """The whole model on the meta device, from config.json alone."""
    outer = HfConfig(read_json(folder / "config.json"))
    config = text_config(outer)
    found = find_architecture(architecture(outer))
    block = _fp8_block(config if config.has("quantization_config") else outer)
    dtype = dtype or stated_dtype(config, outer)
    try:
        model = found.model.from_config(
            dict(config.values), dtype, device, max_model_len, quantization
        )
    except (RuntimeError, OverflowError) as error:  # torch cannot even describe such a tensor
        raise ModelLoadError(f"{folder}: config.json asks for impossible sizes: {error}") from error
    return model, TensorNames(found.prefix, found.other, block)


def has_mtp(folder: Path) -> bool:
    """Whether config.json speaks of MTP layers and the tensors of the first are there."""
    model, names = build_model(folder, None, torch.device("cpu"))
    try:
        model.add_mtp()
    except ModelLoadError:
        return False
    modules = set() if model.mtp is None else set(model.mtp.modules())
    sources = wanted_sources(model, names.prefix)
    added = {name for module, own in sources.items() if module in modules for name in own}
    return added <= Checkpoint(folder).entries.keys()


def stated_dtype(config: HfConfig, outer: HfConfig) -> torch.dtype:
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
    quantization.word("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    sizes = quantization.integers("weight_block_size")
    if len(sizes) != 2 or min(sizes) < 1:
        raise quantization.error(
            "weight_block_size",
            f"must be two positive sizes, is {sizes}; only block-quantised FP8 is supported",
        )
    return sizes[0], sizes[1]
