# SPDX-License-Identifier: MIT
"""Causal attention of a ragged batch over paged keys and values: signatures and torch references.

Row r has query tokens [q_start[r], q_start[r+1]), the last positions of a sequence of kv_len[r]
tokens; position p stands in page page_table[slots[r], p // page_size] at p % page_size. Only
positions below kv_len[r] are read: other pages and page tails may hold anything, NaN included.
`page_table` [num_slots, max_pages], `slots`, `q_start`, `kv_len` are int32.
"""

import torch
from torch import Tensor

from tokenspeed.kernels.registry import define


def _gather(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first `length` tokens standing in `pages`: [length, ...]."""
    index = torch.arange(length, device=cache.device)
    page_size = cache.shape[1]
    return cache[pages.long()[index // page_size], index % page_size]


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q[n,Hq,D] over keys[m,Hk,D] and values[m,Hk,Dv]; query i sees the first m - n + 1 + i."""
    wide = torch.promote_types(q.dtype, torch.float32)
    length, group = keys.shape[0], q.shape[1] // keys.shape[1]
    k = keys.to(wide).repeat_interleave(group, dim=1)
    v = values.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k) * scale
    last = torch.arange(length - q.shape[0], length, device=q.device)
    hidden = torch.arange(length, device=q.device)[None, :] > last[:, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)


def attention_gqa(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
) -> Tensor:
    """q[T,Hq,D], caches [num_pages, page_size, Hk, D or Dv] -> [T,Hq,Dv]; Hq % Hk == 0."""
    out = q.new_zeros(q.shape[0], q.shape[1], value_cache.shape[3])
    starts = q_start.tolist()
    for row, (slot, length) in enumerate(zip(slots.tolist(), kv_len.tolist(), strict=True)):
        tokens = slice(starts[row], starts[row + 1])
        keys = _gather(key_cache, page_table[slot], length)
        values = _gather(value_cache, page_table[slot], length)
        out[tokens] = _attend(q[tokens], keys, values, scale)
    return out


def attention_mla(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
) -> Tensor:
    """q_latent[T,H,L], q_pe[T,H,R], cache [num_pages, page_size, L + R] -> [T,H,L].

    The absorbed form of multi-head latent attention (arXiv:2405.04434): every head reads the same
    cached row as its key, and the row's first L elements as its value.
    """
    q = torch.cat([q_latent, q_pe], dim=-1)
    keys = cache.unsqueeze(2)
    values = keys[..., : q_latent.shape[2]]
    return attention_gqa(q, keys, values, page_table, slots, q_start, kv_len, scale)


define(
    "attention_gqa",
    "(q[T,Hq,D], key_cache, value_cache, page_table, slots[R], q_start[R+1], kv_len[R], scale) "
    "-> [T,Hq,Dv]",
    attention_gqa,
)
define(
    "attention_mla",
    "(q_latent[T,H,L], q_pe[T,H,R], cache, page_table, slots[R], q_start[R+1], kv_len[R], scale) "
    "-> [T,H,L]",
    attention_mla,
)
