# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Latent attention in Triton: the absorbed form, and latents put in line. Knows no layers.

Rows of few queries fill blocks of 16, 32 or 64 (query, head) pairs, all of which read the same
latents once; rows of many queries come as many such blocks.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.kv_fp8 import LATENT, ROPE, ROW_BYTES
from tokenspeed.kernels.registry import Ask
from tokenspeed.kernels.triton_attend import (
    Paged,
    Tiles,
    attend_constants,
    attend_paged,
    attend_rows,
    attend_signature,
    float8_tail,
    load_float8,
    load_folded,
    load_rows,
    parts_of,
)
from tokenspeed.kernels.triton_launch import (
    arch_at,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

# What compiles to matrix instructions without spilling registers (tests/kernels/test_aot.py).
_TILES = {
    "sm_80": (Tiles(16, 32, 8, 3), Tiles(32, 32, 8, 3)),
    "sm_90": (Tiles(16, 64, 4, 2), Tiles(32, 64, 8, 2), Tiles(64, 16, 8, 2)),
    "sm_100": (Tiles(16, 32, 4, 3), Tiles(32, 32, 8, 3), Tiles(64, 32, 8, 2)),
    "sm_120": (Tiles(16, 32, 4, 2), Tiles(32, 16, 8, 2)),
    "gfx942": (Tiles(16, 32, 4, 1),),
    "gfx950": (Tiles(16, 64, 4, 2),),
}
_ELSEWHERE = (Tiles(16, 16, 4, 2),)


def mla_tiles(arch: str, folded: int) -> Tiles:
    """The smallest block that takes so many (query, head) pairs, or the largest there is."""
    found = _TILES.get(arch, _ELSEWHERE)
    return next((tiles for tiles in found if tiles.rows >= folded), found[-1])


def float8_tiles(arch: str, folded: int) -> Tiles:
    """The same where codes are widened on the way: a step of fewer keys, as it passes registers."""
    tiles = mla_tiles(arch, min(folded, 32))
    if arch.startswith("gfx"):
        return Tiles(tiles.rows, 16, 4, tiles.stages)
    return Tiles(tiles.rows, min(tiles.keys, 32), 8, 2)


def attention_mla(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    max_q_len: int = 0,
) -> Tensor:
    """As `kernels/attention.py` says. Tokens of no row stay undefined.

    `max_q_len`: no row has more query tokens, so far as the host knows; 0: it knows nothing.
    """
    num_tokens, heads, latent = q_latent.shape
    _check(q_latent, q_pe, cache)
    out = q_latent.new_empty(num_tokens, heads, latent)
    if num_tokens == 0:
        return out
    batch = Paged(page_table, slots, q_start, kv_len)
    shared = cache.unsqueeze(2)
    for part in parts_of(num_tokens, batch.num_rows, max_q_len):
        cut = float8_tiles if cache.dtype == torch.uint8 else mla_tiles
        tiles = cut(arch_at(q_latent), part.queries * heads)
        attend_paged(q_latent, q_pe, shared, shared, batch, scale, 0, part, tiles, out)
    return out


def _check(q_latent: Tensor, q_pe: Tensor, cache: Tensor) -> None:
    if q_latent.stride(2) != 1 or q_pe.stride(2) != 1:
        raise ValueError("attention_mla: the features of q_latent and q_pe must be contiguous")
    if q_pe.shape[:2] != q_latent.shape[:2] or q_pe.dtype != q_latent.dtype:
        raise ValueError(f"attention_mla: q_pe {tuple(q_pe.shape)} does not go with q_latent")
    width = q_latent.shape[2] + q_pe.shape[2]
    if cache.dtype == torch.uint8:
        if (q_latent.shape[2], q_pe.shape[2]) != (LATENT, ROPE):
            raise ValueError(f"attention_mla: a float8 cache takes {LATENT} + {ROPE} features")
        width = ROW_BYTES
    if cache.dim() != 3 or cache.shape[2] != width or not cache.is_contiguous():
        raise ValueError(f"attention_mla: cache {tuple(cache.shape)} is not rows of {width}")


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def _gather(
    cache,
    page_table,
    slots,
    first,
    starts,
    out,
    num_rows,
    table_stride,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    FLOAT8_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    """cache [P, PAGE, C] -> TOKENS rows of out [starts[num_rows], C]; each finds its sequence."""
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.arange(0, BLOCK)
    pdl_wait(PDL)
    there = place < tl.load(starts + num_rows)
    row = tl.zeros([TOKENS], tl.int32)
    step = 1 << STEPS
    for _ in tl.static_range(STEPS):
        step = step // 2
        further = tl.minimum(row + step, num_rows - 1)
        row = tl.where(tl.load(starts + further) <= place, further, row)
    position = tl.load(first + row) + place - tl.load(starts + row)
    table = page_table + tl.load(slots + row).to(tl.int64) * table_stride
    page = tl.load(table + position // PAGE, mask=there, other=0).to(tl.int64)
    source = page * PAGE + position % PAGE
    if FLOAT8_ROW > 0:
        rows = cache + source * FLOAT8_ROW
        value = load_float8(rows, there, BLOCK, TOKENS)
        further = tl.arange(0, C - BLOCK)
        tail = load_rows(
            float8_tail(rows, BLOCK)[:, None] + further[None, :], there, there, True, False
        )
        ends = out + place.to(tl.int64)[:, None] * C + BLOCK + further[None, :]
        tl.store(ends, tail.to(tl.float32).to(out.dtype.element_ty), mask=there[:, None])
    else:
        value = load_folded(cache, source * C, there, C, BLOCK)
    target = out + place.to(tl.int64)[:, None] * C + feature[None, :]
    mask = there[:, None] & (feature < C)[None, :]
    tl.store(target, value.to(tl.float32).to(out.dtype.element_ty), mask=mask)
    pdl_release(PDL)


_GATHERED = 8  # tokens that a program of `_gather` takes


def _gather_constants(cache_row: int, page: int, num_rows: int, float8: bool) -> dict[str, int]:
    return {
        "C": LATENT + ROPE if float8 else cache_row,
        "BLOCK": LATENT if float8 else triton.next_power_of_2(cache_row),
        "FLOAT8_ROW": cache_row if float8 else 0,
        "PAGE": page,
        "TOKENS": _GATHERED,
        "STEPS": (num_rows - 1).bit_length(),
    }


def gather_latent(
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    first: Tensor,
    starts: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `kernels/latent.py` says. `ValueError`: a strided cache, or bytes of another layout."""
    float8 = cache.dtype == torch.uint8
    if cache.dim() != 3 or not cache.is_contiguous() or (float8 and cache.shape[2] != ROW_BYTES):
        raise ValueError(f"gather_latent: cache {tuple(cache.shape)} {cache.dtype} is not taken")
    width = LATENT + ROPE if float8 else cache.shape[2]
    out = torch.empty(num_rows, width, dtype=dtype, device=cache.device)
    if num_rows == 0:
        return out
    _gather[(triton.cdiv(num_rows, _GATHERED),)](
        cache,
        page_table,
        slots,
        first,
        starts,
        out,
        len(slots),
        page_table.stride(0),
        **_gather_constants(cache.shape[2], cache.shape[1], len(slots), float8),
        num_warps=4,
        **pdl_options(cache),
    )
    return out


def _requires(ask: Ask) -> str | None:
    rope = ask.shapes.get("rope_dim", 64)
    if rope < 16 or rope & (rope - 1):
        return f"rope_dim a power of two from 16, not {rope}"
    return None


def _specimen(arch: str, tiles: Tiles, page: int, float8: bool) -> Specimen:
    constants, options = specimen_pdl(arch)
    row = ROW_BYTES if float8 else LATENT + ROPE
    shapes = attend_constants(tiles, page, 16, (LATENT, ROPE, LATENT), (row, row))
    flags = {"SHARED": True, "WINDOW": False, "SPLIT": True, "WIDE": tl.bfloat16, **constants}
    signature = attend_signature("*bf16", "*fp32")
    if float8:
        signature |= {"keys": "*u8", "values": "*u8"}
    return Specimen(
        f"attention_mla {tiles.rows} rows, pages of {page}{', float8' if float8 else ''}",
        attend_rows,
        signature,
        {**shapes, **flags, "FLOAT8": float8},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        options=options,
        matrix=True,
        quick=tiles.rows == 16 and page == 64 and not float8,
    )


def specimens(arch: str) -> Iterator[Specimen]:
    """DeepSeek's latents for blocks of every size; small pages."""
    constants, options = specimen_pdl(arch)
    tiles = _TILES[arch]
    for cut, page, float8 in [*((t, 64, False) for t in tiles), (tiles[0], 16, False)]:
        yield _specimen(arch, cut, page, float8)
    for cut in tiles[:2]:
        yield _specimen(arch, float8_tiles(arch, cut.rows), 64, True)
    for float8 in (False, True):
        kind, row = ("*u8", ROW_BYTES) if float8 else ("*bf16", LATENT + ROPE)
        yield Specimen(
            f"gather_latent{', float8' if float8 else ''}",
            _gather,
            {**dict.fromkeys(("page_table", "slots", "first", "starts"), "*i32"), "cache": kind}
            | {"out": "*bf16", "num_rows": "i32", "table_stride": "i32"},
            {**_gather_constants(row, 64, 32, float8), **constants},
            options=options,
        )


register_triton("attention_mla", attention_mla, requires=_requires)
register_triton("gather_latent", gather_latent)
