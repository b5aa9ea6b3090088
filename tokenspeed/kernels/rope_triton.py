# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Rotary embedding fused with the append to the paged cache, in Triton. Knows no layers.

A program takes one token and HEADS of its heads; the last programs of a token take its keys and
values to the cache. A negative `cache_index` (a padding token) writes nothing. A latent cache of
bytes takes float8 rows, laid out as `kernels/kv_fp8.py` says.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.kv_fp8 import GROUP, LATENT, ROPE, ROW_BYTES
from tokenspeed.kernels.registry import Ask
from tokenspeed.kernels.triton_launch import (
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_HEADS = 8  # that a program turns


@triton.jit
def _turn(
    source,
    target,
    mask,
    source_head,
    target_head,
    heads,
    cos_sin,
    ROT: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotates the first ROT features of heads [HEADS]; cos_sin points at the position's row."""
    pair = tl.arange(0, HALF)
    there = pair < ROT // 2
    cos = tl.load(cos_sin + pair, mask=there, other=0.0)[None, :]
    sin = tl.load(cos_sin + ROT // 2 + pair, mask=there, other=0.0)[None, :]
    first = 2 * pair if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else ROT // 2)
    both = mask[:, None] & there[None, :]
    inputs, outputs = source + heads[:, None] * source_head, target + heads[:, None] * target_head
    a = tl.load(inputs + first[None, :], mask=both, other=0.0).to(tl.float32)
    b = tl.load(inputs + second[None, :], mask=both, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(outputs + first[None, :], (a * cos - b * sin).to(kind), mask=both)
    tl.store(outputs + second[None, :], (b * cos + a * sin).to(kind), mask=both)


@triton.jit
def _copy(
    source,
    target,
    mask,
    source_head,
    target_head,
    heads,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Features [FIRST, END) of heads [HEADS] as they are."""
    at = FIRST + tl.arange(0, BLOCK)
    both = mask[:, None] & (at < END)[None, :]
    value = tl.load(source + heads[:, None] * source_head + at[None, :], mask=both, other=0.0)
    kind = target.dtype.element_ty
    rounded = value.to(tl.float32).to(kind)
    tl.store(target + heads[:, None] * target_head + at[None, :], rounded, mask=both)


@triton.jit
def _rope_append_gqa(
    q,
    k,
    v,
    cos_sin,
    positions,
    cache_index,
    key_cache,
    value_cache,
    out,
    q_token,
    k_token,
    v_token,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROT: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """q[T,Hq,D], k[T,Hk,D], v[T,Hk,Dv]; grid (T, blocks of query heads, then of key heads)."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    lane = tl.arange(0, HEADS)
    pdl_wait(PDL)
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * ROT
    if block < Q_BLOCKS:
        heads = block * HEADS + lane
        source, target, there = q + token * q_token, out + token * Q_HEADS * D, heads < Q_HEADS
        _turn(source, target, there, D, D, heads, angles, ROT, HALF, INTERLEAVED)
        if ROT < D:
            _copy(source, target, there, D, D, heads, ROT, D, TAIL)
    else:
        heads = (block - Q_BLOCKS) * HEADS + lane
        index = tl.load(cache_index + token).to(tl.int64)
        there = (heads < KV_HEADS) & (index >= 0)
        source, target = k + token * k_token, key_cache + index * KV_HEADS * D
        _turn(source, target, there, D, D, heads, angles, ROT, HALF, INTERLEAVED)
        if ROT < D:
            _copy(source, target, there, D, D, heads, ROT, D, TAIL)
        source, target = v + token * v_token, value_cache + index * KV_HEADS * VALUE_DIM
        _copy(source, target, there, VALUE_DIM, VALUE_DIM, heads, 0, VALUE_DIM, VALUE_BLOCK)
    pdl_release(PDL)


@triton.jit
def encode_e4m3(x):
    """float32 -> the byte of its nearest e4m3 number (ties to even, 448 at most; NaN is 0x7f).

    By integer arithmetic: not every device converts, and AMD's older ones mean another format.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # 2^-6 and above: round to 3 bits of mantissa where they stand, then move the exponent.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below: the number of steps of 2^-9. Adding 2^14 leaves just those bits, rounded.
    steps = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, steps, normal)
    code = tl.where(size >= 0x43E00000, 0x7E, code)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def _append_e4m3(latent, codes, scales, index, LATENT: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """A latent [LATENT] as e4m3 codes with a float32 scale for each group."""
    group, place = tl.arange(0, LATENT // GROUP_SIZE), tl.arange(0, GROUP_SIZE)
    at = group[:, None] * GROUP_SIZE + place[None, :]
    value = tl.load(latent + at).to(tl.float32)
    largest = tl.max(tl.abs(value), 1)
    scale = tl.where(largest > 0.0, tl.div_rn(largest, 448.0 + tl.zeros_like(largest)), 1.0)
    scale += tl.sum(value * 0.0, 1)  # NaN if any feature is no number: readers know no code for it
    code = encode_e4m3(tl.div_rn(value, scale[:, None] + tl.zeros_like(value)))
    tl.store(codes + at, code, mask=index >= 0)
    tl.store(scales + group, scale, mask=index >= 0)


@triton.jit
def _rope_append_mla(
    q_pe,
    k_pe,
    latent,
    cos_sin,
    positions,
    cache_index,
    cache,
    scales,
    rope_cache,
    out,
    q_token,
    q_head,
    k_token,
    latent_token,
    Q_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    ROT: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    FP8_GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """q_pe[T,H,R], k_pe[T,R], latent[T,L]; grid (T, blocks of heads + 1).

    Cache rows are LATENT + ROT elements; with FP8_GROUP, bytes: `scales` and `rope_cache` are the
    same memory as float32 and as the keys' type.
    """
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, HEADS)
    pdl_wait(PDL)
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * ROT
    if block * HEADS < Q_HEADS:
        heads = block * HEADS + lane
        source, target = q_pe + token * q_token, out + token * Q_HEADS * ROT
        there = heads < Q_HEADS
        _turn(source, target, there, q_head, ROT, heads, angles, ROT, HALF, INTERLEAVED)
    else:
        index = tl.load(cache_index + token).to(tl.int64)
        one = tl.arange(0, 1)
        inside = (one == 0) & (index >= 0)
        values = latent + token * latent_token
        if FP8_GROUP == 0:
            row = cache + index * (LATENT + ROT)
            _copy(values, row, inside, 0, 0, one, 0, LATENT, LATENT_BLOCK)
            key = row + LATENT
        else:
            BYTES: tl.constexpr = LATENT + 4 * (LATENT // FP8_GROUP) + 2 * ROT
            first = index * BYTES
            _append_e4m3(
                values, cache + first, scales + (first + LATENT) // 4, index, LATENT, FP8_GROUP
            )
            key = rope_cache + (first + BYTES) // 2 - ROT
        _turn(k_pe + token * k_token, key, inside, 0, 0, one, angles, ROT, HALF, INTERLEAVED)
    pdl_release(PDL)


def _block(size: int) -> int:
    return int(triton.next_power_of_2(max(size, 1)))


def _check_heads(name: str, x: Tensor) -> None:
    if x.dim() != 3 or x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"rope_append_gqa: {name} {tuple(x.shape)} has gaps between its heads")


def _check_cache(op: str, name: str, cache: Tensor, row: tuple[int, ...]) -> None:
    if cache.shape[2:] != row or not cache.is_contiguous():
        raise ValueError(f"{op}: {name} {tuple(cache.shape)} is not contiguous rows of {row}")


def _gqa_constants(
    q_heads: int, kv_heads: int, dim: int, value_dim: int, rot: int
) -> dict[str, Any]:
    return {
        "Q_HEADS": q_heads,
        "KV_HEADS": kv_heads,
        "D": dim,
        "VALUE_DIM": value_dim,
        "ROT": rot,
        "HALF": _block(rot // 2),
        "TAIL": _block(dim - rot),
        "VALUE_BLOCK": _block(value_dim),
        "HEADS": _HEADS,
    }


def rope_append_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache_index: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    interleaved: bool,
) -> Tensor:
    """As `kernels/rope.py` says. `ValueError`: gaps between heads, caches of other rows or int8."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_heads(name, x)
    if torch.uint8 in (key_cache.dtype, value_cache.dtype):
        raise ValueError("rope_append_gqa: triton does not write int8 caches")
    _check_cache("rope_append_gqa", "key_cache", key_cache, tuple(k.shape[1:]))
    _check_cache("rope_append_gqa", "value_cache", value_cache, tuple(v.shape[1:]))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    if num_tokens == 0:
        return out
    blocks = triton.cdiv(q_heads, _HEADS) + triton.cdiv(kv_heads, _HEADS)
    _rope_append_gqa[(num_tokens, blocks)](
        q,
        k,
        v,
        cos_sin,
        positions,
        cache_index,
        key_cache,
        value_cache,
        out,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        **_gqa_constants(q_heads, kv_heads, dim, v.shape[2], cos_sin.shape[1]),
        INTERLEAVED=interleaved,
        num_warps=2,
        **pdl_options(q),
    )
    return out


def _latent_views(cache: Tensor, latent_dim: int, rot: int) -> tuple[Tensor, Tensor, int]:
    """The cache's memory as scales and as rotated keys, and the group of float8 (0: no float8)."""
    if cache.dtype != torch.uint8:
        _check_cache("rope_append_mla", "cache", cache, (latent_dim + rot,))
        return cache, cache, 0
    if (latent_dim, rot) != (LATENT, ROPE):
        raise ValueError(f"rope_append_mla: a float8 cache takes {LATENT} + {ROPE} features")
    _check_cache("rope_append_mla", "cache", cache, (ROW_BYTES,))
    flat = cache.view(-1)
    return flat.view(torch.float32), flat.view(torch.bfloat16), GROUP


def rope_append_mla(
    q_pe: Tensor,
    k_pe: Tensor,
    latent: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache_index: Tensor,
    cache: Tensor,
    interleaved: bool,
) -> Tensor:
    """As `kernels/rope.py` says. `ValueError`: features that are strided, a cache of other rows."""
    for name, x in (("q_pe", q_pe), ("k_pe", k_pe), ("latent", latent)):
        if x.stride(-1) != 1:
            raise ValueError(f"rope_append_mla: the features of {name} are strided")
    num_tokens, heads, rot = q_pe.shape
    latent_dim = latent.shape[1]
    scales, rope_cache, group = _latent_views(cache, latent_dim, rot)
    out = torch.empty(q_pe.shape, dtype=q_pe.dtype, device=q_pe.device)
    if num_tokens == 0:
        return out
    _rope_append_mla[(num_tokens, triton.cdiv(heads, _HEADS) + 1)](
        q_pe,
        k_pe,
        latent,
        cos_sin,
        positions,
        cache_index,
        cache,
        scales,
        rope_cache,
        out,
        q_pe.stride(0),
        q_pe.stride(1),
        k_pe.stride(0),
        latent.stride(0),
        Q_HEADS=heads,
        LATENT=latent_dim,
        LATENT_BLOCK=_block(latent_dim),
        ROT=rot,
        HALF=_block(rot // 2),
        INTERLEAVED=interleaved,
        HEADS=_HEADS,
        FP8_GROUP=group,
        num_warps=2,
        **pdl_options(q_pe),
    )
    return out


def specimens(arch: str) -> Iterator[Specimen]:
    """Qwen3's and DeepSeek's heads; latents in bfloat16 and in float8."""
    constants, options = specimen_pdl(arch)
    tables = {"cos_sin": "*fp32", "positions": "*i32", "cache_index": "*i64"}
    pointers = dict.fromkeys(("q", "k", "v", "key_cache", "value_cache", "out"), "*bf16")
    strides = dict.fromkeys(("q_token", "k_token", "v_token"), "i32:16")
    for rot, interleaved in ((128, False), (64, True)):
        yield Specimen(
            f"rope_append_gqa 16/8 heads of 128, {rot} turned",
            _rope_append_gqa,
            {**pointers, **tables, **strides},
            {**_gqa_constants(16, 8, 128, 128, rot), "INTERLEAVED": interleaved, **constants},
            num_warps=2,
            options=options,
            quick=rot == 64,
        )
    strides = dict.fromkeys(("q_token", "q_head", "k_token", "latent_token"), "i32:16")
    pointers = dict.fromkeys(("q_pe", "k_pe", "latent", "rope_cache", "out"), "*bf16")
    sizes = {"Q_HEADS": 16, "LATENT": 512, "LATENT_BLOCK": 512, "ROT": 64, "HALF": 32}
    for group in (0, GROUP):
        cache = ("*u8", "*fp32") if group else ("*bf16", "*bf16")
        yield Specimen(
            f"rope_append_mla 16 heads, {'float8' if group else 'bfloat16'} latents",
            _rope_append_mla,
            {**pointers, **tables, **strides, "cache": cache[0], "scales": cache[1]},
            {**sizes, "INTERLEAVED": True, "HEADS": _HEADS, "FP8_GROUP": group, **constants},
            num_warps=2,
            options=options,
        )


def _requires(ask: Ask) -> str | None:
    if ask.shapes.get("kv_bits") == 8:
        return "keys and values in floating point, not in 8 bits"
    return None


register_triton("rope_append_gqa", rope_append_gqa, requires=_requires)
register_triton("rope_append_mla", rope_append_mla)
