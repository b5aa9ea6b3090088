# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention over paged keys and keys in line, and merged states, in Triton. Knows no layers.

Rows of few queries are cut along their contexts (`triton_attend`), rows of many along their
queries (`triton_flash`). A batch that has both takes a launch for each.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Ask
from tokenspeed.kernels.triton_attend import (
    Paged,
    Tiles,
    attend_constants,
    attend_paged,
    attend_rows,
    attend_signature,
    combine_specimen,
    parts_of,
)
from tokenspeed.kernels.triton_flash import (
    Keys,
    flash,
    flash_constants,
    flash_rows,
    flash_signature,
)
from tokenspeed.kernels.triton_launch import (
    arch_at,
    expect_contiguous,
    expect_rows,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_FEW = {
    "sm_80": Tiles(16, 64, 4, 3),
    "sm_90": Tiles(16, 64, 4, 4),
    "sm_100": Tiles(16, 64, 4, 3),
    "sm_120": Tiles(16, 32, 4, 2),
    "gfx942": Tiles(16, 32, 4, 1),
    "gfx950": Tiles(16, 64, 4, 2),
}
_MANY = {
    "sm_80": Tiles(128, 32, 8, 3),
    "sm_90": Tiles(128, 64, 8, 2),
    "sm_100": Tiles(128, 64, 8, 2),
    "sm_120": Tiles(64, 32, 4, 2),
    "gfx942": Tiles(64, 32, 4, 1),
    "gfx950": Tiles(128, 32, 8, 2),
}
_FEW_ELSEWHERE, _MANY_ELSEWHERE = Tiles(16, 32, 4, 2), Tiles(64, 32, 4, 2)
_MOST_FEATURES = 256  # of a key or a value, tail apart


def few_tiles(arch: str, features: int, folded: int) -> Tiles:
    """For rows of so many (query, head of a group) pairs; more than fit are taken in turn."""
    found = _FEW.get(arch, _FEW_ELSEWHERE)
    most = 16 if arch.startswith("gfx") else 32
    rows = min(most, max(found.rows, triton.next_power_of_2(folded)))
    warps = 8 if rows > 16 or features > 128 else found.warps
    return Tiles(rows, found.keys, warps, found.stages)


def many_tiles(arch: str, features: int, queries: int) -> Tiles:
    """For blocks of queries; wide keys and values take fewer of them."""
    found = _MANY.get(arch, _MANY_ELSEWHERE)
    if features > 192:
        found = Tiles(64, 32, 4 if arch == "sm_100" else 8, found.stages)
    rows = min(found.rows, max(16, triton.next_power_of_2(queries)))
    return Tiles(rows, found.keys, found.warps if rows > 32 else 4, found.stages)


def _cut(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features as a head and a tail: 192 are 128 and 64, most are a head alone."""
    size = x.shape[-1]
    head = 1 << (size.bit_length() - 1)
    tail = size - head
    if tail < 16 or tail & (tail - 1):
        return x, x[..., size:]
    return x[..., :head], x[..., head:]


def attention_gqa(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int = 0,
    max_q_len: int = 0,
) -> Tensor:
    """As `kernels/attention.py` says. Tokens of no row stay undefined.

    `max_q_len`: no row has more query tokens, so far as the host knows; 0: it knows nothing.
    """
    _check_gqa(q, key_cache, value_cache)
    num_tokens, heads, dim = q.shape
    group = heads // key_cache.shape[2]
    out = q.new_empty(num_tokens, heads, value_cache.shape[3])
    if num_tokens == 0:
        return out
    batch = Paged(page_table, slots, q_start, kv_len)
    arch, cut = arch_at(q), _cut(q)
    for part in parts_of(num_tokens, batch.num_rows, max_q_len):
        folded = part.queries * group
        if part.long:
            many = many_tiles(arch, max(dim, out.shape[2]), folded)
            keys = Keys(*_cut(key_cache), value_cache, kv_len, page_table, slots)
            flash(*cut, keys, q_start, scale, many, out, window=window, min_q_len=part.many)
        else:
            few = few_tiles(arch, max(dim, out.shape[2]), folded)
            attend_paged(*cut, key_cache, value_cache, batch, scale, window, part, few, out)
    return out


def _check_gqa(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    if torch.uint8 in (key_cache.dtype, value_cache.dtype):
        raise ValueError("attention_gqa: triton does not read int8 caches")
    expect_rows("attention_gqa", q=q)
    expect_contiguous("attention_gqa", key_cache=key_cache, value_cache=value_cache)
    if key_cache.shape[:3] != value_cache.shape[:3] or key_cache.shape[3] != q.shape[2]:
        raise ValueError(f"attention_gqa: caches {tuple(key_cache.shape)} do not go with q")
    if q.shape[1] % key_cache.shape[2]:
        raise ValueError(f"attention_gqa: {q.shape[1]} heads over {key_cache.shape[2]} of keys")


def attention_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    k_start: Tensor,
    scale: float,
    causal: bool = True,
    q_tail: Tensor | None = None,
    k_tail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels/attention.py` says. Tokens of no row stay undefined."""
    if (q_tail is None) != (k_tail is None):
        raise ValueError("attention_ragged: q_tail and k_tail go together")
    expect_rows("attention_ragged", q=q, k=k, v=v)
    num_tokens, heads, _ = q.shape
    out = q.new_empty(num_tokens, heads, v.shape[2])
    lse = torch.empty(num_tokens, heads, dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out, lse
    if q_tail is None or k_tail is None:
        (head, tail), (keys, tails) = _cut(q), _cut(k)
    else:
        head, tail, keys, tails = q, q_tail, k, k_tail.unsqueeze(1)
    features = max(head.shape[2] + tail.shape[2], v.shape[2])
    tiles = many_tiles(arch_at(q), features, num_tokens * heads // k.shape[1])
    line = Keys(keys, tails, v, k_start)
    flash(head, tail, line, q_start, scale, tiles, out, lse=lse, causal=causal)
    return out, lse


@triton.jit(do_not_specialize=["num_rows"])
def _merge(
    a,
    lse_a,
    b,
    lse_b,
    out,
    lse,
    num_rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """a, b [num_rows, D], lse_a, lse_b [num_rows] -> out, lse."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    there = row < num_rows
    at = row[:, None] * D + feature[None, :]
    mask = there[:, None] & (feature < D)[None, :]
    pdl_wait(PDL)
    size_a = tl.load(lse_a + row, mask=there, other=float("-inf"))
    size_b = tl.load(lse_b + row, mask=there, other=float("-inf"))
    most = tl.maximum(size_a, size_b)
    most = tl.where(most == float("-inf"), 0.0, most)
    share_a, share_b = tl.exp(size_a - most), tl.exp(size_b - most)
    total = share_a + share_b
    first = tl.load(a + at, mask=mask, other=0.0).to(tl.float32) * share_a[:, None]
    second = tl.load(b + at, mask=mask, other=0.0).to(tl.float32) * share_b[:, None]
    pdl_release(PDL)
    merged = (first + second) / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row, most + tl.log(total), mask=there)


_MERGED = 2048  # numbers that a program of `_merge` makes


def merge_state(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels/attention.py` says. `ValueError`: inputs with gaps."""
    expect_contiguous("merge_state", a=a, lse_a=lse_a, b=b, lse_b=lse_b)
    out, lse = torch.empty_like(a), torch.empty_like(lse_a)
    if out.numel() == 0:
        return out, lse
    block = triton.next_power_of_2(a.shape[2])
    rows = max(1, _MERGED // block)
    grid = (triton.cdiv(lse.numel(), rows),)
    _merge[grid](
        a,
        lse_a,
        b,
        lse_b,
        out,
        lse,
        lse.numel(),
        D=a.shape[2],
        BLOCK=block,
        ROWS=rows,
        num_warps=4,
        **pdl_options(a),
    )
    return out, lse


def _requires(ask: Ask) -> str | None:
    if ask.shapes.get("kv_bits") == 8:
        return "keys and values in floating point, not in 8 bits"
    dim = ask.shapes.get("head_dim", 128)
    return None if dim <= _MOST_FEATURES else f"head_dim up to {_MOST_FEATURES}, not {dim}"


def specimens(arch: str) -> Iterator[Specimen]:
    """Qwen3's heads, few queries and many; DeepSeek's materialised heads; windows, small pages."""
    constants, options = specimen_pdl(arch)
    flags: dict[str, Any] = {"WIDE": tl.bfloat16, **constants}
    common: dict[str, Any] = {"options": options, "matrix": True}
    for folded, dim, page, window in (
        (2, 128, 64, False),
        (64, 128, 16, True),
        (16, 256, 64, False),
    ):
        few = few_tiles(arch, dim, folded)
        yield Specimen(
            f"attention_gqa {few.rows} rows of {dim}{', window, pages of 16' if window else ''}",
            attend_rows,
            attend_signature("*bf16", "*fp32"),
            attend_constants(few, page, 2, (dim, 0, dim), (8 * dim, 8 * dim))
            | {**flags, "SHARED": False, "WINDOW": window, "SPLIT": True, "FLOAT8": False},
            num_warps=few.warps,
            num_stages=few.stages,
            **common,
        )
    for dim in (128, 256):
        many = many_tiles(arch, dim, 1 << 20)
        yield Specimen(
            f"attention_gqa {many.rows} queries of {dim}",
            flash_rows,
            flash_signature("*bf16"),
            flash_constants(many, 64, 2, (dim, 0, dim), (8 * dim, 8 * dim, 8 * dim))
            | {**flags, "CAUSAL": True, "WINDOW": False, "LSE": False},
            num_warps=many.warps,
            num_stages=many.stages,
            quick=dim == 128,
            **common,
        )
    many = many_tiles(arch, 192, 1 << 20)
    for causal in (True, False):
        yield Specimen(
            f"attention_ragged 192/128{', causal' if causal else ''}",
            flash_rows,
            flash_signature("*bf16"),
            flash_constants(many, 0, 1, (128, 64, 128), (4096, 64, 4096))
            | {**flags, "CAUSAL": causal, "WINDOW": False, "LSE": True},
            num_warps=many.warps,
            num_stages=many.stages,
            **common,
        )
    yield from combine_specimen(arch)
    yield Specimen(
        "merge_state 128",
        _merge,
        {**dict.fromkeys(("a", "b", "out"), "*bf16"), "num_rows": "i32"}
        | dict.fromkeys(("lse_a", "lse_b", "lse"), "*fp32"),
        {"D": 128, "BLOCK": 128, "ROWS": 16, **constants},
        options=options,
    )


register_triton("attention_gqa", attention_gqa, requires=_requires)
register_triton("attention_ragged", attention_ragged)
register_triton("merge_state", merge_state)
