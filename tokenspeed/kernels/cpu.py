# SPDX-License-Identifier: MIT
"""Registers the compiled CPU kernels. Knows no arithmetic: that is csrc/cpu.

The callables are the compiled functions themselves, so that a call costs no Python; collectives
with a fused norm are a group's call and a compiled one.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.collective import all_reduce_add_rms_norm_by, reduce_scatter_add_rms_norm_by
from tokenspeed.kernels.registry import Ask, Kernel, register


def _exchange(_: Ask) -> str | None:
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    return f"torch {torch.__version__} has no DLPack exchange API"


_WIDE: dict[str, Kernel] = {
    "rms_norm": _cpu.rms_norm,
    "add_rms_norm": _cpu.add_rms_norm,
    "rope_append_gqa": _cpu.rope_append_gqa,
    "rope_append_mla": _cpu.rope_append_mla,
    "attention_gqa": _cpu.attention_gqa,
    "attention_mla": _cpu.attention_mla,
    "silu_mul": _cpu.silu_mul,
    "embedding": _cpu.embedding,
    "add": _cpu.add,
    "moe": _cpu.moe,
    "linear": _cpu.linear,
    "head_linear": _cpu.head_linear,
    "all_reduce_add_rms_norm": all_reduce_add_rms_norm_by(_cpu.add_rms_norm),
    "reduce_scatter_add_rms_norm": reduce_scatter_add_rms_norm_by(_cpu.add_rms_norm),
}
_FLOAT32: dict[str, Kernel] = {
    "route": _cpu.route,
    "sample": _cpu.sample,
    "apply_penalties": _cpu.apply_penalties,
}
for _ops, _dtypes in ((_WIDE, (torch.float32, torch.bfloat16)), (_FLOAT32, (torch.float32,))):
    for _op, _kernel in _ops.items():
        register(_op, "cpu", _kernel, devices=("cpu",), dtypes=_dtypes, requires=_exchange)
