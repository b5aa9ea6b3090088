# SPDX-License-Identifier: MIT
"""The drafter with weights that the options ask for, if any. Knows no caches and no steps."""

import torch

from tokenspeed.execution.speculation.model_drafter import ChainDrafter
from tokenspeed.execution.speculation.mtp import mtp_drafter
from tokenspeed.execution.speculation.options import Speculation
from tokenspeed.models.build import Mtp
from tokenspeed.models.causal_lm import CausalLM


def wanted_mtp(speculation: Speculation) -> Mtp:
    """Whether the model is loaded with its MTP module."""
    if speculation.model_method != "mtp":
        return "without"
    return "if there" if speculation.is_auto else "with"


def make_model_drafter(
    speculation: Speculation, model: CausalLM, kv_dtype: torch.dtype | None
) -> ChainDrafter | None:
    """None if no method with weights is asked for, or auto finds none.

    `kv_dtype` is that of its keys and values; None: the model's. `ValueError`: a method that is
    not served.
    """
    method = speculation.model_method
    if method is None:
        return None
    if method == "mtp":
        return None if model.mtp is None else mtp_drafter(model, kv_dtype, speculation.depth)
    raise ValueError(f"speculative_config: method {method} is not served yet")
