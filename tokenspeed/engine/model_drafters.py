# SPDX-License-Identifier: MIT
"""The drafter with weights that the options ask for, if any. Knows no caches and no steps."""

from pathlib import Path

import torch

from tokenspeed.execution.speculation.draft_model import draft_model_drafter
from tokenspeed.execution.speculation.eagle3 import eagle3_drafter
from tokenspeed.execution.speculation.model_drafter import ChainDrafter
from tokenspeed.execution.speculation.mtp import mtp_drafter
from tokenspeed.execution.speculation.options import Speculation
from tokenspeed.models.build import Mtp, Ranks
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.draft_model import load_draft_model
from tokenspeed.models.eagle3_build import load_eagle3
from tokenspeed.models.hub import resolve_model


def wanted_mtp(speculation: Speculation) -> Mtp:
    """Whether the model is loaded with its MTP module."""
    if speculation.model_method != "mtp":
        return "without"
    return "if there" if speculation.is_auto else "with"


def make_model_drafter(
    speculation: Speculation,
    model: CausalLM,
    folder: Path,
    ranks: Ranks,
    kv_dtype: torch.dtype | None,
) -> ChainDrafter | None:
    """For the loaded share of the model in `folder`. None if no method with weights is asked for,
    or auto finds none.

    `kv_dtype` is that of a head's keys and values; None: the model's. `ModelLoadError`: the
    drafter's own folder is wrong or does not fit. `ValueError`: the ranks do not.
    """
    method, depth, tp = (
        speculation.model_method,
        speculation.depth,
        speculation.draft_tensor_parallel_size,
    )
    if method == "mtp":
        return None if model.mtp is None else mtp_drafter(model, kv_dtype, depth)
    if method is None or speculation.model is None:
        return None
    own = resolve_model(speculation.model)
    if method == "eagle3":
        return eagle3_drafter(load_eagle3(own, model, ranks), kv_dtype, depth)
    return draft_model_drafter(load_draft_model(own, model, folder, ranks, tp), depth)
