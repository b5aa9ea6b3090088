# SPDX-License-Identifier: MIT
"""From a model's name to the model on the meta device: a folder, a cached hub id, a shipped shape.

Reads config.json and nothing else; never downloads. Refuses to know meshes and devices.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from tokenspeed.errors import ModelLoadError
from tokenspeed.layers.attention_gqa import GqaAttention
from tokenspeed.layers.attention_mla import MlaAttention
from tokenspeed.layers.moe import Experts
from tokenspeed.models.build import stated_dtype
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.hf_config import HfConfig, architecture, read_json, text_config
from tokenspeed.models.hub import DEMO, DEMO_FOLDER
from tokenspeed.models.registry import find_architecture
from tokenspeed.planner.folding import FoldedModel, fold_layers
from tokenspeed.planner.weight_format import BF16, FP32, FormatOf, choose_formats

SHAPES = Path(__file__).parent.parent / "assets" / "models"
META = torch.device("meta")


@dataclass(frozen=True)
class PlannedModel:
    """A model without weights, and how each module's weights are held."""

    name: str
    model: CausalLM
    format_of: FormatOf
    kv_dtype: torch.dtype

    @cached_property
    def folded(self) -> FoldedModel:
        return fold_layers(self.model, lambda path, module: self.format_of(path, module).name)

    @property
    def weight_bytes(self) -> float:
        """Of the whole model."""
        total = 0.0
        for path, module in self.model.named_modules():
            size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            total += size * self.format_of(path, module).bytes_per_element
        return total

    @property
    def table_bytes(self) -> int:
        """Of the rotary tables, which every rank holds whole; layers share them."""
        found = {
            id(module.cos_sin): module.cos_sin
            for module in self.model.modules()
            if isinstance(module, (GqaAttention, MlaAttention))
        }
        return sum(table.nbytes for table in found.values())

    @property
    def has_experts(self) -> bool:
        return any(isinstance(module, Experts) for module in self.model.modules())

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def shipped_names() -> list[str]:
    return sorted([DEMO, *(path.stem for path in SHAPES.glob("*.json"))])


def open_model(name: str, *, weight_dtype: str = "auto", kv_dtype: str = "auto") -> PlannedModel:
    """`ModelLoadError`: no such name here, or a configuration that is not supported."""
    return describe(name, read_json(find_config(name)), weight_dtype, kv_dtype)


def describe(
    name: str, values: Mapping[str, Any], weight_dtype: str = "auto", kv_dtype: str = "auto"
) -> PlannedModel:
    """The model of a parsed config.json. `weight_dtype`, `kv_dtype`: "auto" or a format's name."""
    outer = HfConfig(values)
    config = text_config(outer)
    dtype = stated_dtype(config, outer)
    try:
        found = find_architecture(architecture(outer))
        model = found.model.from_config(dict(config.values), dtype, META)
    except (RuntimeError, OverflowError) as error:
        raise ModelLoadError(f"{name}: config.json asks for impossible sizes: {error}") from error
    plain = FP32 if dtype == torch.float32 else BF16
    quantized = config if config.has("quantization_config") else outer
    kinds = {"auto": dtype, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return PlannedModel(
        name, model, choose_formats(quantized, plain, weight_dtype), kinds[kv_dtype]
    )


def find_config(name: str) -> Path:
    """The config.json of a shipped shape, a folder, or a hub id whose config is in the cache."""
    if name == DEMO:
        return DEMO_FOLDER / "config.json"
    if name in shipped_names():
        return SHAPES / f"{name}.json"
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return folder / "config.json"
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    raise ModelLoadError(
        f"{name!r} is no folder, no hub id in the local cache, and none of the shipped shapes: "
        + ", ".join(shipped_names())
    )
