# SPDX-License-Identifier: MIT
"""Routing, gated activation and routed experts: signatures and torch references."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed.kernels.quant import QuantWeight, dequantize
from tokenspeed.kernels.registry import define


def silu_mul(x: Tensor) -> Tensor:
    """x[T, 2I] -> [T, I]: silu(first half) * second half, rounded once."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    norm: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """logits[T,E] float32, bias[E] float32 or None -> (weights[T,k] float32, ids[T,k] int32).

    `scoring` is "softmax" or "sigmoid". `bias` steers the choice and never the weights. With
    n_group > 1 only experts of the topk_group best groups compete; a group's score is its best
    expert ("max") or the sum of its two best ("top2"). Ids come in falling order, the lower id
    first at a tie. `norm` makes the weights sum to 1 before `scale`. Sources: arXiv:2405.04434
    (groups), arXiv:2412.19437 (sigmoid and bias).
    """
    if scoring not in ("softmax", "sigmoid") or group_score not in ("max", "top2"):
        raise ValueError(f"unknown scoring {scoring!r} or group_score {group_score!r}")
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        grouped = choice.view(choice.shape[0], n_group, choice.shape[1] // n_group)
        best = grouped.topk(1 if group_score == "max" else 2, dim=-1)[0].sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True)[1][:, :topk_group]
        keep = torch.zeros_like(best, dtype=torch.bool).scatter(1, kept, True)
        choice = grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True)[1][:, :top_k]
    weights = scores.gather(1, ids)
    if norm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.to(torch.int32)


def moe(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    addend: Tensor | None = None,
) -> Tensor:
    """x[T,D], w13[E,2I,D] (gate, then up), w2[E,D,I], weights[T,k], ids[T,k] -> [T,D].

    The sum over a token's experts e of weight * w2[e] silu_mul(w13[e] x), plus addend[T,D], rounded
    once. Only experts named by `ids` are read; an id below 0 is nobody's and adds nothing.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in torch.unique(ids[ids >= 0]).tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        hidden = silu_mul(F.linear(x[token], w13[expert]))
        share = F.linear(hidden, w2[expert]).to(wide) * weights[token, choice, None].to(wide)
        out.index_add_(0, token, share)
    if addend is not None:
        out += addend
    return out.to(x.dtype)


def moe_quant(
    x: Tensor,
    w13: QuantWeight,
    w2: QuantWeight,
    weights: Tensor,
    ids: Tensor,
    addend: Tensor | None = None,
) -> Tensor:
    """As `moe`, with quantised weights. Backends may quantise x and the inner rows as well."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w13_wide, w2_wide = dequantize(w13).to(wide), dequantize(w2).to(wide)
    return moe(x.to(wide), w13_wide, w2_wide, weights, ids, addend).to(x.dtype)


define("silu_mul", "(x[T,2I]) -> [T,I]", silu_mul)
define(
    "route",
    "(logits[T,E] f32, bias[E] f32 or None, top_k, scoring, n_group, topk_group, group_score, "
    "norm, scale) -> (weights[T,k] f32, ids[T,k] int32)",
    route,
)
_EXPERTS = "weights[T,k] f32, ids[T,k] int32, addend[T,D] or None) -> [T,D]"
define("moe", f"(x[T,D], w13[E,2I,D], w2[E,D,I], {_EXPERTS}", moe)
define("moe_quant", f"(x[T,D], w13, w2 QuantWeight as of moe, {_EXPERTS}", moe_quant)
