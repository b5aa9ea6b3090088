# SPDX-License-Identifier: MIT
"""A family's whole model on the meta device, for what reads specs and shapes. Reads no weights."""

import json
from typing import Any

import torch

from tests.checkpoints import FAMILIES
from tokenspeed.layers.layer import Target
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import find_architecture

TARGET = Target(torch.device("cpu"), torch.float32)


def build(family: str, **changes: Any) -> CausalLM:
    values = json.loads(FAMILIES[family](architectures=[], **changes).to_json_string(False))
    names = {
        "deepseek_v2": "DeepseekV2",
        "deepseek_v3": "DeepseekV3",
        "qwen3_moe": "Qwen3Moe",
        "minimax_m2": "MiniMaxM2",
    }
    model = find_architecture(names.get(family, family.capitalize()) + "ForCausalLM").model
    return model.from_config(values, TARGET.dtype, TARGET.device)
