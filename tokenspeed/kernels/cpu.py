# SPDX-License-Identifier: MIT
"""Registers the compiled CPU kernels. Knows no arithmetic: that is csrc/cpu.

The callables are the compiled functions themselves, so that a call costs no Python; collectives
with a fused norm are a group's call and a compiled one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.collective import all_reduce_add_rms_norm_by, reduce_scatter_add_rms_norm_by
from tokenspeed.kernels.quant import QuantWeight, dequantize
from tokenspeed.kernels.registry import Ask, Kernel, register


def _exchange(_: Ask) -> str | None:
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    return f"torch {torch.__version__} has no DLPack exchange API"


def _no_float8(ask: Ask) -> str | None:
    if ask.shapes.get("kv_bits") == 8:
        return "latent caches of float32 and bfloat16, not of float8"
    return _exchange(ask)


def _pack_quantised(weight: QuantWeight) -> Any:
    """int8 and int4 as codes; what no CPU multiplies is held as bfloat16."""
    if weight.format in ("int8", "int4"):
        bits = 8 if weight.format == "int8" else 4
        return _cpu.pack_codes(weight.codes, weight.scales, bits, weight.group)
    return _cpu.pack(dequantize(weight).to(torch.bfloat16))


# Kernel and what brings its weights into its layout. A kernel has one: `partial` makes another.
_WEIGHTS: dict[str, tuple[Kernel, Callable[[Any], Any]]] = {
    "linear": (_cpu.linear, _cpu.pack),
    "linear_quant": (partial(_cpu.linear), _pack_quantised),
    "head_linear": (_cpu.head_linear, _cpu.pack),
    "moe": (_cpu.moe, _cpu.pack),
    "moe_quant": (partial(_cpu.moe), _pack_quantised),
}
_WIDE: dict[str, Kernel] = {
    "quantize": _cpu.quantize,
    "rms_norm": _cpu.rms_norm,
    "add_rms_norm": _cpu.add_rms_norm,
    "rope_append_gqa": _cpu.rope_append_gqa,
    "rope_append_mla": _cpu.rope_append_mla,
    "attention_gqa": _cpu.attention_gqa,
    "attention_mla": _cpu.attention_mla,
    "attention_ragged": _cpu.attention_ragged,
    "merge_state": _cpu.merge_state,
    "gather_latent": _cpu.gather_latent,
    "silu_mul": _cpu.silu_mul,
    "embedding": _cpu.embedding,
    "add": _cpu.add,
    "all_reduce_add_rms_norm": all_reduce_add_rms_norm_by(_cpu.add_rms_norm),
    "reduce_scatter_add_rms_norm": reduce_scatter_add_rms_norm_by(_cpu.add_rms_norm),
}
_FLOAT32: dict[str, Kernel] = {
    "route": _cpu.route,
    "sample": _cpu.sample,
    "apply_penalties": _cpu.apply_penalties,
}
_LATENT = ("rope_append_mla", "attention_mla", "gather_latent")
_BOTH = (torch.float32, torch.bfloat16)
for _ops, _dtypes in ((_WIDE, _BOTH), (_FLOAT32, (torch.float32,))):
    for _op, _kernel in _ops.items():
        _needs = _no_float8 if _op in _LATENT else _exchange
        register(_op, "cpu", _kernel, devices=("cpu",), dtypes=_dtypes, requires=_needs)
for _op, (_kernel, _pack) in _WEIGHTS.items():
    register(_op, "cpu", _kernel, devices=("cpu",), dtypes=_BOTH, requires=_exchange, pack=_pack)
