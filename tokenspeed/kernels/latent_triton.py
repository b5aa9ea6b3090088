# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Latent attention in Triton: the absorbed form, and latents put in line. Knows no layers.

Rows of few queries fill blocks of 16, 32 or 64 (query, head) pairs, all of which read the same
latents once; rows of many queries come as many such blocks.
"""

from collections.abc import Iterator
from typing import Any

import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Ask
from tokenspeed.kernels.triton_attend import (
    Paged,
    Tiles,
    attend_constants,
    attend_paged,
    attend_rows,
    rows_of,
)
from tokenspeed.kernels.triton_launch import arch_at, register_triton, specimen_pdl
from tokenspeed.kernels.triton_targets import Specimen

# What compiles to matrix instructions without spilling registers (tests/kernels/test_aot.py).
_TILES = {
    "sm_80": (Tiles(16, 32, 8, 3), Tiles(32, 32, 8, 3)),
    "sm_90": (Tiles(16, 64, 4, 3), Tiles(32, 64, 8, 3), Tiles(64, 32, 8, 3)),
    "sm_100": (Tiles(16, 32, 4, 3), Tiles(32, 32, 8, 3), Tiles(64, 32, 8, 3)),
    "sm_120": (Tiles(16, 32, 4, 2), Tiles(32, 16, 8, 2)),
    "gfx942": (Tiles(16, 32, 4, 1),),
    "gfx950": (Tiles(16, 64, 4, 2),),
}
_ELSEWHERE = (Tiles(16, 16, 4, 2),)


def mla_tiles(arch: str, folded: int) -> Tiles:
    """The smallest block that takes so many (query, head) pairs, or the largest there is."""
    found = _TILES.get(arch, _ELSEWHERE)
    return next((tiles for tiles in found if tiles.rows >= folded), found[-1])


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
    for rows in rows_of(num_tokens, batch.num_rows, max_q_len):
        tiles = mla_tiles(arch_at(q_latent), rows.max_q_len * heads)
        attend_paged(q_latent, q_pe, shared, shared, batch, scale, 0, rows, tiles, out)
    return out


def _check(q_latent: Tensor, q_pe: Tensor, cache: Tensor) -> None:
    if q_latent.stride(2) != 1 or q_pe.stride(2) != 1:
        raise ValueError("attention_mla: the features of q_latent and q_pe must be contiguous")
    if q_pe.shape[:2] != q_latent.shape[:2] or q_pe.dtype != q_latent.dtype:
        raise ValueError(f"attention_mla: q_pe {tuple(q_pe.shape)} does not go with q_latent")
    width = q_latent.shape[2] + q_pe.shape[2]
    if cache.dim() != 3 or cache.shape[2] != width or not cache.is_contiguous():
        raise ValueError(f"attention_mla: cache {tuple(cache.shape)} is not rows of {width}")


def _requires(ask: Ask) -> str | None:
    rope = ask.shapes.get("rope_dim", 64)
    if rope < 16 or rope & (rope - 1):
        return f"rope_dim a power of two from 16, not {rope}"
    return None


def mla_signature(kv: str, out: str) -> dict[str, str]:
    """Run-time arguments of `attend_rows` for latents."""
    return {
        **dict.fromkeys(("q", "q_tail", "keys", "values"), kv),
        **dict.fromkeys(("page_table", "slots", "q_start", "kv_len"), "*i32"),
        "out": out,
        "lse": "*fp32",
        "scale": "fp32",
        **dict.fromkeys(("num_rows", "num_tokens", "table_stride", "blocks"), "i32"),
        **dict.fromkeys(("min_q_len", "max_q_len", "window"), "i32"),
        **dict.fromkeys(("q_token", "q_head", "tail_token", "tail_head"), "i32:16"),
        **dict.fromkeys(("key_page", "key_head", "value_page", "value_head"), "i32:16"),
    }


def specimens(arch: str) -> Iterator[Specimen]:
    """DeepSeek's latents for blocks of every size; small pages."""
    constants, options = specimen_pdl(arch)
    cuts: list[tuple[Tiles, int, dict[str, Any]]] = [(t, 64, {}) for t in _TILES[arch]]
    cuts.append((_TILES[arch][0], 16, {}))
    for tiles, page, more in cuts:
        shapes = attend_constants(tiles, page, 16, (512, 64, 512), (576, 576))
        flags = {"SHARED": True, "WINDOW": False, "SPLIT": True, "WIDE": tl.bfloat16, **constants}
        yield Specimen(
            f"attention_mla {tiles.rows} rows, pages of {page}",
            attend_rows,
            mla_signature("*bf16", "*fp32"),
            {**shapes, **flags, **more},
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            options=options,
            matrix=True,
            quick=tiles.rows == 16 and page == 64,
        )


register_triton("attention_mla", attention_mla, requires=_requires)
