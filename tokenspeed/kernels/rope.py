# SPDX-License-Identifier: MIT
"""Rotary embedding fused with the append to the paged cache: signatures and torch references.

`cos_sin` is float32 [P, rot]: row p holds cos of the rot/2 angles of position p, then sin. The
first `rot` elements of a head are rotated: pair i is (i, i + rot/2), or (2i, 2i + 1) if
`interleaved`; results stay where their inputs stood. `cache_index[t]` is page * page_size + offset.
"""

import torch
from torch import Tensor

from tokenspeed.kernels.kv_fp8 import pack_fp8
from tokenspeed.kernels.kv_int8 import pack_int8
from tokenspeed.kernels.registry import define


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x[T, H, D] -> [T, H, D], its first cos_sin.shape[1] elements rotated."""
    rot = cos_sin.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos_sin[positions.long()].to(wide.dtype)[:, None, :].chunk(2, dim=-1)
    head, tail = wide[..., :rot], wide[..., rot:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = head.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, tail], dim=-1).to(x.dtype)


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
    """Rotates q[T,Hq,D] and k[T,Hk,D]; writes k and v[T,Hk,Dv] into the caches; returns q'.

    positions[T] int32, cache_index[T] int64, key_cache [num_pages, page_size, Hk, D], value_cache
    [num_pages, page_size, Hk, Dv], of any float dtype, or uint8 with rows of D + 4 and Dv + 4
    (`kv_int8.py`); the caches' pages, rows and heads may lie in any order. q, k, v may be strided
    over tokens.
    """
    turned = rotate(k, cos_sin, positions, interleaved)
    page, place = cache_index // key_cache.shape[1], cache_index % key_cache.shape[1]
    for rows, cache in ((turned, key_cache), (v, value_cache)):
        held = pack_int8(rows) if cache.dtype == torch.uint8 else rows.to(cache.dtype)
        cache[page, place] = held
    return rotate(q, cos_sin, positions, interleaved)


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
    """Rotates q_pe[T,H,R] and k_pe[T,R]; writes (latent[T,L], k_pe') into the cache; returns q_pe'.

    cache [num_pages, page_size, L + R], or bytes as `kv_fp8.py` says. Inputs may be strided over
    tokens, q_pe over heads too.
    """
    turned = rotate(k_pe[:, None, :], cos_sin, positions, interleaved)[:, 0]
    if cache.dtype == torch.uint8:
        row = pack_fp8(latent, turned)
    else:
        row = torch.cat([latent, turned], dim=-1).to(cache.dtype)
    cache.view(-1, cache.shape[2])[cache_index] = row
    return rotate(q_pe, cos_sin, positions, interleaved)


define(
    "rope_append_gqa",
    "(q[T,Hq,D], k[T,Hk,D], v[T,Hk,Dv], cos_sin[P,rot] f32, positions[T] int32 >= 0, "
    "cache_index[T] int64 >= 0, key_cache[N,page_size,Hk,...], value_cache[N,page_size,Hk,...], "
    "interleaved) -> q'[T,Hq,D]",
    rope_append_gqa,
)
define(
    "rope_append_mla",
    "(q_pe[T,H,R], k_pe[T,R], latent[T,L], cos_sin[P,R] f32, positions[T] int32 >= 0, "
    "cache_index[T] int64 >= 0, cache[N,page_size,...], interleaved) -> q_pe'[T,H,R]",
    rope_append_mla,
)
