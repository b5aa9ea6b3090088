# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The choice of experts in Triton, one launch: a program scores and chooses for one token.

Experts stand as a tile [groups, experts of a group]; the best are taken one after the other, the
lower id first at a tie, NaN before everything. Knows no experts.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.triton_launch import (
    expect_contiguous,
    expect_rows,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen


@triton.jit
def _best(keys, ids, free):
    """The id of the largest free key of a tile, the lowest at a tie."""
    top = tl.max(tl.max(tl.where(free, keys, -float("inf")), 1), 0)
    return tl.min(tl.min(tl.where(free & (keys == top), ids, 1 << 30), 1), 0)


@triton.jit
def _group_keys(keys, ids, inside, TOP2: tl.constexpr):
    """Of each group [G, S]: its largest key, or the sum of its two largest."""
    lowest = -float("inf")
    keys = tl.where(inside, keys, lowest)
    first = tl.max(keys, 1)
    if TOP2:
        at = tl.min(tl.where(keys == first[:, None], ids, 1 << 30), 1)
        first += tl.max(tl.where(ids == at[:, None], lowest, keys), 1)
    return first


@triton.jit
def _route(
    logits,
    bias,
    weights,
    ids,
    top_k,
    topk_group,
    scale,
    x_token,
    E: tl.constexpr,
    N_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZES: tl.constexpr,
    CHOICES: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOP2: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits[T, E] -> weights, ids [T, top_k]; GROUPS, SIZES, CHOICES hold them, powers of 2."""
    SIZE: tl.constexpr = E // N_GROUP
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZES)
    expert = group[:, None] * SIZE + member[None, :]
    inside = (group < N_GROUP)[:, None] & (member < SIZE)[None, :]
    pdl_wait(PDL)
    x = tl.load(logits + token * x_token + expert, mask=inside, other=-float("inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        powers = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = powers / tl.sum(tl.sum(powers, 1), 0)
    keys = scores
    if bias is not None:
        keys += tl.load(bias + expert, mask=inside, other=0.0)
    keys = tl.where(keys == keys, keys, float("inf"))
    free = inside
    if N_GROUP > 1:
        of_group = _group_keys(keys, expert, inside, TOP2)[:, None]
        open_groups = (group < N_GROUP)[:, None]
        for _ in range(topk_group):
            open_groups &= group[:, None] != _best(of_group, group[:, None], open_groups)
        keys = tl.where(open_groups, -float("inf"), keys)
    place = tl.arange(0, CHOICES)
    chosen, shares = tl.zeros([CHOICES], tl.int32), tl.zeros([CHOICES], tl.float32)
    for choice in range(top_k):
        best = _best(keys, expert, free)
        free &= expert != best
        share = tl.sum(tl.sum(tl.where(expert == best, scores, 0.0), 1), 0)
        chosen = tl.where(place == choice, best, chosen)
        shares = tl.where(place == choice, share, shares)
    if NORM:
        shares = shares / (tl.sum(shares, 0) + 1e-20)
    pdl_release(PDL)
    tl.store(weights + token * top_k + place, shares * scale, mask=place < top_k)
    tl.store(ids + token * top_k + place, chosen, mask=place < top_k)


def _check(
    logits: Tensor, bias: Tensor | None, top_k: int, groups: tuple[int, int], words: tuple[str, str]
) -> None:
    scoring, group_score = words
    if scoring not in ("softmax", "sigmoid") or group_score not in ("max", "top2"):
        raise ValueError(f"route: unknown scoring {scoring!r} or group_score {group_score!r}")
    expect_rows("route", logits=logits)
    if bias is not None:
        expect_contiguous("route", bias=bias)
    experts, (n_group, topk_group) = logits.shape[1], groups
    if n_group < 1 or experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(f"route: {topk_group} of {n_group} groups of {experts} experts")
    if group_score == "top2" and n_group > 1 and experts // n_group < 2:
        raise ValueError(f"route: groups of {experts // n_group} have no two best experts")
    available = topk_group * (experts // n_group)
    if not 1 <= top_k <= available:
        raise ValueError(f"route: top_k is {top_k}, of {available} experts")


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

    As the reference says, in the same order of ids.
    """
    _check(logits, bias, top_k, (n_group, topk_group), (scoring, group_score))
    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            *(logits, bias, weights, ids, top_k, topk_group, scale, logits.stride(0)),
            E=experts,
            N_GROUP=n_group,
            GROUPS=triton.next_power_of_2(n_group),
            SIZES=triton.next_power_of_2(experts // n_group),
            CHOICES=triton.next_power_of_2(top_k),
            SIGMOID=scoring == "sigmoid",
            TOP2=group_score == "top2",
            NORM=norm,
            num_warps=_warps(experts),
            **pdl_options(logits),
        )
    return weights, ids


def _warps(experts: int) -> int:
    return max(1, min(8, experts // 128))


def specimens(arch: str) -> Iterator[Specimen]:
    """DeepSeek V2 Lite, DeepSeek V3, Qwen3."""
    pdl, options = specimen_pdl(arch)
    types = {"logits": "*fp32", "weights": "*fp32", "ids": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("top_k", "topk_group", "x_token"), "i32")
    for name, experts, groups, choices, sigmoid in (
        ("V2 Lite", 64, 1, 8, False),
        ("V3", 256, 8, 8, True),
        ("Qwen3", 128, 1, 8, False),
    ):
        constants = {"E": experts, "N_GROUP": groups, "GROUPS": groups, "CHOICES": choices}
        constants |= {"SIZES": experts // groups, "SIGMOID": sigmoid, "TOP2": sigmoid}
        yield Specimen(
            f"route {name}",
            _route,
            types | ({"bias": "*fp32"} if sigmoid else {}),
            {**constants, "NORM": True, **({} if sigmoid else {"bias": None}), **pdl},
            num_warps=_warps(experts),
            options=options,
            quick=sigmoid,
        )


register_triton("route", route, (torch.float32,))
