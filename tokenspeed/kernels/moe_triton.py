# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Routed experts in Triton: two products over the experts that tokens chose, then a sum in order.

    hidden[pair] = silu_mul(w13[expert] x[token]);  part[pair] = weight * w2[expert] hidden[pair]

A pair is a token's choice. Up to 64 tokens, the programs of the first pair that names an expert
gather its other pairs themselves, so nothing is launched before the products; beyond, pairs are
sorted into blocks of one expert each, on the device. Neither path knows how many tokens chose what:
grids are upper bounds. A token's result depends on no other token; the two paths may differ.
Knows no router and no ranks: ids below 0 are computed elsewhere.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.quant import QuantWeight
from tokenspeed.kernels.triton_launch import (
    WIDE_TYPES,
    arch_at,
    expect_contiguous,
    expect_rows,
    num_units,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_product import (
    ELEMENTS,
    MEDIUM,
    SMALL,
    Operand,
    Tile,
    form_constants,
    grouped_order,
    operand,
    product,
    quantised,
    tile_for,
)
from tokenspeed.kernels.triton_targets import Specimen

_BAND = 8
_CHUNK = 32  # pairs that a sorting program places
_SUM_BLOCK = 512


@triton.jit
def _expert_tile(
    x,
    weight,
    scales,
    shares,
    out,
    overall,
    pair,
    live,
    expert,
    block_n,
    num_outputs,
    size,
    code_row,
    scale_row,
    scale_expert,
    x_row,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of an expert's outputs for some pairs, stored as out[pair, num_outputs].

    x has a row for CHOICES pairs. GATED: the tile's upper half are rows of the gate, its lower half
    the same rows of the up projection; else the result is weighted by shares[pair].
    """
    BLOCK_T: tl.constexpr = pair.shape[0]
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    place = tl.arange(0, BLOCK_N)
    row = tl.minimum(block_n * WIDTH + place % WIDTH, num_outputs - 1)
    rows = num_outputs
    if GATED:
        row += (place // WIDTH) * num_outputs
        rows = 2 * num_outputs
    weight += (expert.to(tl.int64) * rows + row) * code_row
    if FORMAT == "fp8":
        scales += expert.to(tl.int64) * scale_expert + (row // 128) * scale_row
    elif FORMAT != "dense":
        scales += expert.to(tl.int64) * scale_expert + row * scale_row
    x += (pair // CHOICES).to(tl.int64) * x_row
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc = product(acc, weight, scales, x, 0, size, size, BLOCK_K, COMPUTE, EVEN, FORMAT, GROUP)
    if FORMAT == "nvfp4":
        acc *= overall
    if GATED:
        halves = tl.permute(tl.reshape(acc, [2, WIDTH, BLOCK_T]), (1, 2, 0))
        gate, up = tl.split(halves)
        value = gate / (1.0 + tl.exp(-gate)) * up
    else:
        value = acc * tl.load(shares + pair).to(tl.float32)[None, :]
    at = block_n * WIDTH + tl.arange(0, WIDTH)
    target = out + pair.to(tl.int64)[None, :] * num_outputs + at[:, None]
    mask = (at < num_outputs)[:, None] & live[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _experts_few(
    x,
    weight,
    scales,
    shares,
    ids,
    out,
    overall,
    num_pairs,
    num_experts,
    num_outputs,
    size,
    code_row,
    scale_row,
    scale_expert,
    x_row,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """ids[num_pairs] <= PAIRS; program (pair, block of outputs). A repeated expert is skipped."""
    pdl_wait(PDL)
    mine = tl.program_id(0)
    expert = tl.load(ids + mine)
    every = tl.arange(0, PAIRS)
    same = tl.load(ids + every, mask=every < num_pairs, other=-1) == expert
    earlier = tl.sum((same & (every < mine)).to(tl.int32), 0)
    if (expert < 0) | (expert >= num_experts) | (earlier > 0):
        return
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    count = tl.sum(same.to(tl.int32), 0)
    for first in range(0, count, BLOCK_T):
        wanted = first + tl.arange(0, BLOCK_T)
        chosen = same[None, :] & (rank[None, :] == tl.minimum(wanted, count - 1)[:, None])
        pair = tl.sum(tl.where(chosen, every[None, :], 0), 1)
        _expert_tile(
            x, weight, scales, shares, out, overall, pair, wanted < count, expert,
            tl.program_id(1), num_outputs, size, code_row, scale_row, scale_expert, x_row,
            CHOICES, GATED, BLOCK_N, BLOCK_K, COMPUTE, EVEN, FORMAT, GROUP,
        )  # fmt: skip
    pdl_release(PDL)


@triton.jit
def _experts_many(
    x,
    weight,
    scales,
    shares,
    order,
    experts,
    out,
    overall,
    num_blocks,
    num_outputs,
    size,
    code_row,
    scale_row,
    scale_expert,
    x_row,
    BAND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """order[num_blocks, BLOCK_T] pairs, -1 for none; experts[num_blocks], -1 behind the last."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    blocks_n = tl.cdiv(num_outputs, WIDTH)
    block_n, block = grouped_order(tl.program_id(0), blocks_n, num_blocks, BAND)
    pdl_wait(PDL)
    expert = tl.load(experts + block)
    if expert < 0:
        return
    pair = tl.load(order + block * BLOCK_T + tl.arange(0, BLOCK_T))
    _expert_tile(
        x, weight, scales, shares, out, overall, tl.maximum(pair, 0), pair >= 0, expert,
        block_n, num_outputs, size, code_row, scale_row, scale_expert, x_row, CHOICES, GATED,
        BLOCK_N, BLOCK_K, COMPUTE, EVEN, FORMAT, GROUP,
    )  # fmt: skip
    pdl_release(PDL)


@triton.jit
def _count_pairs(
    ids, counts, ranks, num_pairs, num_experts, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """counts[E], from -1 on, and each pair's rank in its expert; the order of ranks is chance's."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < num_pairs
    pdl_wait(PDL)
    expert = tl.load(ids + pair, mask=mask, other=-1)
    mask = (expert >= 0) & (expert < num_experts)
    rank = tl.atomic_add(counts + expert, 1, mask=mask, sem="relaxed") + 1
    tl.store(ranks + pair, rank, mask=mask)


@triton.jit
def _place_pairs(
    ids,
    counts,
    ranks,
    order,
    experts,
    num_pairs,
    num_blocks,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """order[start of its expert + rank] = pair, and the expert of each block of BLOCK_T."""
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    every = tl.arange(0, EXPERTS)
    pdl_wait(PDL)
    count = tl.load(counts + every, mask=every < E, other=-1) + 1
    blocks = (count + BLOCK_T - 1) // BLOCK_T
    ends = tl.cumsum(blocks, 0)
    expert = tl.load(ids + at, mask=at < num_pairs, other=-1)
    mask = (expert >= 0) & (expert < E)
    rank = tl.load(ranks + at, mask=mask, other=0)
    own = expert[:, None] == every[None, :]
    first = tl.sum(tl.where(own, (ends - blocks)[None, :], 0), 1)
    tl.store(order + first * BLOCK_T + rank, at, mask=mask)
    owner = tl.sum((ends[None, :] <= at[:, None]).to(tl.int32), 1)
    tl.store(experts + at, owner, mask=(at < num_blocks) & (owner < E))


@triton.jit
def _add_choices(
    parts,
    ids,
    addend,
    out,
    num_experts,
    width,
    addend_token,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts[T, CHOICES, width] -> out[T, width], in order, then the addend."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    pdl_wait(PDL)
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOICES):
        pair = token * CHOICES + choice
        expert = tl.load(ids + pair)
        here = mask & (expert >= 0) & (expert < num_experts)
        acc += tl.load(parts + pair * width + at, mask=here, other=0.0).to(tl.float32)
    if addend is not None:
        acc += tl.load(addend + token * addend_token + at, mask=mask, other=0.0).to(tl.float32)
    pdl_release(PDL)
    tl.store(out + token * width + at, acc.to(out.dtype.element_ty), mask=mask)


def _tile(
    arch: str, units: int, tokens: int, outputs: int, size: int, itemsize: int, choices: int
) -> Tile:
    """Of few tokens: for a single one. Of many: wide, its tokens filled in by `_order`."""
    if tokens <= MEDIUM:
        tile = tile_for(arch, units, 1, outputs, size, itemsize, choices)
        return replace(tile, splits=1, tokens=SMALL)
    return replace(tile_for(arch, 1, tokens, outputs, size, itemsize), rows=128, warps=8)


def _block_tokens(num_pairs: int, num_experts: int) -> int:
    """Tokens of a tile of many: results are the same for both."""
    return 128 if num_pairs >= 96 * num_experts else 64


def _order(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, int]:
    """Pairs sorted by expert into blocks: order, experts of blocks, and how many at most."""
    num_pairs = ids.numel()
    num_blocks = num_pairs // block + min(num_experts, num_pairs)
    sizes = (num_experts, num_blocks * block, num_blocks)
    counts, order, experts = torch.full(
        (sum(sizes),), -1, dtype=torch.int32, device=ids.device
    ).split(sizes)
    ranks = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    _count_pairs[(triton.cdiv(num_pairs, 256),)](
        ids, counts, ranks, num_pairs, num_experts, BLOCK=256, **pdl_options(ids)
    )
    _place_pairs[(triton.cdiv(max(num_pairs, num_blocks), _CHUNK),)](
        *(ids, counts, ranks, order, experts, num_pairs, num_blocks),
        E=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_T=block,
        CHUNK=_CHUNK,
        **pdl_options(ids),
    )
    return order, experts, num_blocks


class _Products:
    """The two products of one call: what they share, and how each is launched."""

    def __init__(self, x: Tensor, shares: Tensor, ids: Tensor, num_experts: int) -> None:
        self.tokens, self.choices = ids.shape
        self.shares, self.ids, self.num_experts = shares, ids, num_experts
        self.few = self.tokens <= MEDIUM
        self.arch, self.units, self.pdl = arch_at(x), num_units(x), pdl_options(x)
        if not self.few:
            self.block = _block_tokens(ids.numel(), num_experts)
            self.sorted = _order(ids, num_experts, self.block)

    def run(self, x: Tensor, weight: Operand, out: Tensor, *, gated: bool) -> None:
        """x[T,D] (gated) or [pairs,I] -> out[pairs, outputs]."""
        outputs, size = out.shape[1], x.shape[1]
        itemsize = x.dtype.itemsize
        rows = 2 * outputs if gated else outputs
        tile = _tile(self.arch, self.units, self.tokens, rows, size, itemsize, self.choices)
        tile = quantised(tile, weight)
        constants = _constants(tile, weight, size, x.dtype, self.choices if gated else 1, gated)
        expert = 0 if weight.scales is None else weight.scales[0].numel()
        sizes = (outputs, size, weight.code_row, weight.scale_row, expert, x.stride(0))
        tensors = (x, weight.codes, weight.scales, self.shares)
        options = {"num_warps": tile.warps, "num_stages": tile.stages, **self.pdl}
        blocks_n = triton.cdiv(rows, tile.rows)
        if self.few:
            pairs = self.ids.numel()
            _experts_few[(pairs, blocks_n)](
                *(*tensors, self.ids, out, weight.overall, pairs, self.num_experts, *sizes),
                PAIRS=max(16, triton.next_power_of_2(pairs)),
                BLOCK_T=tile.tokens,
                **constants,
                **options,
            )
            return
        order, experts, blocks = self.sorted
        _experts_many[(blocks_n * blocks,)](
            *(*tensors, order, experts, out, weight.overall, blocks, *sizes),
            BAND=_BAND,
            BLOCK_T=self.block,
            **constants,
            **options,
        )


def _constants(
    tile: Tile, weight: Operand, size: int, dtype: torch.dtype, choices: int, gated: bool
) -> dict[str, Any]:
    blocks = {"CHOICES": choices, "GATED": gated, "BLOCK_N": tile.rows}
    return blocks | form_constants(weight, size, tile.depth, dtype)


def _check(op: str, x: Tensor, w13: Operand, w2: Operand) -> None:
    size = x.shape[-1]
    if x.dtype not in ELEMENTS:
        raise ValueError(f"{op}: x is {x.dtype}, must be one of {list(ELEMENTS)}")
    if len(w13.shape) != 3 or w13.shape[1] % 2 or w13.shape[2] != size:
        raise ValueError(f"{op}: w13 {w13.shape} is not [E, 2I, {size}]")
    if w2.shape != (w13.shape[0], size, w13.shape[1] // 2):
        raise ValueError(f"{op}: w2 {w2.shape} does not fit w13 {w13.shape}")


def _moe(
    op: str,
    x: Tensor,
    experts: tuple[Tensor, Tensor] | tuple[QuantWeight, QuantWeight],
    shares: Tensor,
    ids: Tensor,
    addend: Tensor | None,
) -> Tensor:
    w13, w2 = operand(op, "w13", experts[0]), operand(op, "w2", experts[1])
    _check(op, x, w13, w2)
    expect_rows(op, x=x, **({} if addend is None else {"addend": addend}))
    expect_contiguous(op, weights=shares)
    num_experts, size, inner = w2.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if ids.numel() == 0 or out.numel() == 0:
        return out.zero_() if addend is None else out.copy_(addend)
    products = _Products(x, shares, ids, num_experts)
    hidden = torch.empty((ids.numel(), inner), dtype=x.dtype, device=x.device)
    wide = torch.float32 if products.few else x.dtype
    parts = torch.empty((ids.numel(), size), dtype=wide, device=x.device)
    products.run(x, w13, hidden, gated=True)
    products.run(hidden, w2, parts, gated=False)
    _add_choices[(x.shape[0], triton.cdiv(size, _SUM_BLOCK))](
        *(parts, ids, addend, out, num_experts, size, 0 if addend is None else addend.stride(0)),
        CHOICES=ids.shape[1],
        BLOCK=_SUM_BLOCK,
        **pdl_options(x),
    )
    return out


def moe(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    addend: Tensor | None = None,
) -> Tensor:
    """x[T,D], w13[E,2I,D] (gate, then up), w2[E,D,I], weights[T,k], ids[T,k] int32 -> [T,D].

    `addend` [T,D] is added to the experts' sum before it is rounded.
    """
    return _moe("moe", x, (w13, w2), weights, ids, addend)


def moe_quant(
    x: Tensor,
    w13: QuantWeight,
    w2: QuantWeight,
    weights: Tensor,
    ids: Tensor,
    addend: Tensor | None = None,
) -> Tensor:
    """As `moe`, with quantised experts."""
    return _moe("moe_quant", x, (w13, w2), weights, ids, addend)


_SHAPES = (
    # tokens, choices, experts, hidden, intermediate: DeepSeek V2 Lite, V3 over 8 devices
    (1, 6, 64, 2048, 1408),
    (32, 8, 256, 7168, 256),
    (8192, 6, 64, 2048, 1408),
)
_FORMS = (
    ("dense", 1, "*bf16", None),
    ("int8", 32, "*i8", "*bf16"),
    ("int4", 32, "*u8", "*bf16"),
    ("fp8", 128, "*u8", "*fp32"),
    ("mxfp4", 32, "*u8", "*u8"),
    ("nvfp4", 16, "*u8", "*u8"),
)
_SIZES = ("num_outputs", "size", "code_row", "scale_expert", "x_row")


def _specimen(
    name: str, arch: str, shape: tuple[int, ...], form: tuple[Any, ...], gated: bool
) -> Specimen:
    tokens, choices, num_experts, hidden, inner = shape
    weight = Operand(torch.empty(0), None, (), form[0], form[1])
    outputs, size = (2 * inner, hidden) if gated else (hidden, inner)
    tile = quantised(_tile(arch, 132, tokens, outputs, size, 2, choices), weight)
    pdl, options = specimen_pdl(arch)
    constants = _constants(tile, weight, size, torch.bfloat16, choices if gated else 1, gated) | pdl
    few = tokens <= MEDIUM
    types = {"x": "*bf16", "weight": form[2], "shares": "*fp32", "overall": "fp32"}
    types["out"] = "*fp32" if few and not gated else "*bf16"
    types |= dict.fromkeys(_SIZES, "i32:16") | {"scale_row": "i32"}
    if form[3] is None:
        constants["scales"] = None
    else:
        types["scales"] = form[3]
    if few:
        types |= {"ids": "*i32", "num_pairs": "i32", "num_experts": "i32"}
        pairs = max(16, triton.next_power_of_2(tokens * choices))
        constants |= {"PAIRS": pairs, "BLOCK_T": tile.tokens}
    else:
        types |= {"order": "*i32", "experts": "*i32", "num_blocks": "i32"}
        constants |= {"BAND": _BAND, "BLOCK_T": _block_tokens(tokens * choices, num_experts)}
    return Specimen(
        f"moe {name} {'up' if gated else 'down'} T={tokens} {num_experts}x{inner}x{hidden}",
        _experts_few if few else _experts_many,
        types,
        constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        options=options,
        matrix=tile.rows >= 64,
        quick=name == "dense" and gated and not few,
    )


def specimens(arch: str) -> Iterator[Specimen]:
    """Both products of both paths in every format, the sort, and the sum."""
    for form in _FORMS:
        for shape in _SHAPES:
            for gated in (True, False):
                yield _specimen(form[0], arch, shape, form, gated)
    constants, options = specimen_pdl(arch)
    yield Specimen(
        "moe count",
        _count_pairs,
        dict.fromkeys(("ids", "counts", "ranks"), "*i32")
        | {"num_pairs": "i32", "num_experts": "i32"},
        {"BLOCK": 256, **constants},
        options=options,
    )
    tensors = dict.fromkeys(("ids", "counts", "ranks", "order", "experts"), "*i32")
    yield Specimen(
        "moe place",
        _place_pairs,
        tensors | {"num_pairs": "i32", "num_blocks": "i32"},
        {"E": 256, "EXPERTS": 256, "BLOCK_T": 64, "CHUNK": _CHUNK, **constants},
        options=options,
    )
    yield Specimen(
        "moe sum",
        _add_choices,
        {
            **dict.fromkeys(("addend", "out"), "*bf16"),
            **dict.fromkeys(("width", "addend_token"), "i32:16"),
            "parts": "*fp32",
            "ids": "*i32",
            "num_experts": "i32",
        },
        {"CHOICES": 8, "BLOCK": _SUM_BLOCK, **constants},
        options=options,
    )


register_triton("moe", moe, WIDE_TYPES)
register_triton("moe_quant", moe_quant, WIDE_TYPES)
