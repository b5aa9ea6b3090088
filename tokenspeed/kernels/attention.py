# SPDX-License-Identifier: MIT
"""Causal attention of a ragged batch: signatures and torch references.

Row r has query tokens [q_start[r], q_start[r+1]), the last positions of a sequence of kv_len[r]
tokens; position p stands in page page_table[slots[r], p // page_size] at p % page_size. Only
positions below kv_len[r] are read: other pages and page tails may hold anything, NaN included.
`page_table` [num_slots, max_pages], `slots`, `q_start`, `kv_len` are int32. `max_q_len`: no row has
more queries, as far as the host knows (0: it does not); a hint to launches, never to results. A
grouped-query cache may be uint8 (`kv_int8.py`).
"""

import torch
from torch import Tensor

from tokenspeed.kernels.kv_fp8 import unpack_fp8
from tokenspeed.kernels.kv_int8 import unpack_int8
from tokenspeed.kernels.registry import define


def gather_rows(cache: Tensor, pages: Tensor, first: int, last: int) -> Tensor:
    """Positions [first, last) of the sequence standing in `pages`: [last - first, ...]."""
    index = torch.arange(first, last, device=cache.device)
    page_size = cache.shape[1]
    return cache[pages.long()[index // page_size], index % page_size]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool = True, window: int = 0
) -> tuple[Tensor, Tensor]:
    """q[n,Hq,D] over keys[m,Hk,D] and values[m,Hk,Dv] -> (out[n,Hq,Dv], lse[n,Hq] float32).

    Causal: query i sees the first m - n + 1 + i keys, of which the last `window` if that is not 0.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    length, group = keys.shape[0], q.shape[1] // keys.shape[1]
    k = keys.to(wide).repeat_interleave(group, dim=1)
    v = values.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k) * scale
    last = torch.arange(length - q.shape[0], length, device=q.device)[:, None]
    places = torch.arange(length, device=q.device)[None, :]
    hidden = places > last if causal else places < 0
    if window:
        hidden = hidden | (places <= last - window)
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)  # [h, q]
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    out = torch.einsum("hqk,khd->qhd", torch.exp(scores - shift[..., None]), v)
    return out.to(q.dtype), lse.T.float()


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
    """q[T,Hq,D], caches [num_pages, page_size, Hk, D or Dv] -> [T,Hq,Dv]; Hq % Hk == 0.

    `window` w above 0: the query at position p sees keys p - w + 1 to p.
    """
    quantised = key_cache.dtype == torch.uint8
    value_dim = value_cache.shape[3] - (4 if quantised else 0)
    out = q.new_zeros(q.shape[0], q.shape[1], value_dim)
    starts = q_start.tolist()
    for row, (slot, length) in enumerate(zip(slots.tolist(), kv_len.tolist(), strict=True)):
        tokens = slice(starts[row], starts[row + 1])
        keys = gather_rows(key_cache, page_table[slot], 0, length)
        values = gather_rows(value_cache, page_table[slot], 0, length)
        if quantised:
            keys, values = unpack_int8(keys), unpack_int8(values)
        out[tokens] = _attend(q[tokens], keys, values, scale, window=window)[0]
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
    max_q_len: int = 0,
) -> Tensor:
    """q_latent[T,H,L], q_pe[T,H,R], cache [num_pages, page_size, L + R] -> [T,H,L].

    The absorbed form of multi-head latent attention (arXiv:2405.04434): every head reads the same
    cached row as its key, and the row's first L elements as its value. A cache of bytes is float8
    (`kv_fp8.py`).
    """
    q = torch.cat([q_latent, q_pe], dim=-1)
    keys = (unpack_fp8(cache) if cache.dtype == torch.uint8 else cache).unsqueeze(2)
    values = keys[..., : q_latent.shape[2]]
    return attention_gqa(q, keys, values, page_table, slots, q_start, kv_len, scale)


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
    """q[T,Hq,D], k[S,Hk,D], v[S,Hk,Dv] -> (out[T,Hq,Dv], lse[T,Hq] float32). Keys stand in line.

    Row r's queries [q_start[r], q_start[r+1]) see its keys [k_start[r], k_start[r+1]): all of them,
    or, causal, the last query all and each query one key less than the one after it. `q_tail`
    [T,Hq,R] and `k_tail` [S,R], both or neither, go on q and k: features of a key that all heads
    share. lse is the natural logarithm of the sum of exp(scale * score); a query that sees no key
    gives zeros and -inf. q, k, v may be strided over tokens and heads. q_start, k_start are int32.
    """
    if q_tail is not None and k_tail is not None:
        q = torch.cat([q, q_tail], dim=-1)
        k = torch.cat([k, k_tail[:, None, :].expand(-1, k.shape[1], -1)], dim=-1)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    q_bounds, k_bounds = q_start.tolist(), k_start.tolist()
    for row in range(len(q_bounds) - 1):
        rows = slice(q_bounds[row], q_bounds[row + 1])
        keys = slice(k_bounds[row], k_bounds[row + 1])
        out[rows], lse[rows] = _attend(q[rows], k[keys], v[keys], scale, causal)
    return out, lse


def merge_state(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys -> over both: (out[T,H,D], lse[T,H] float32).

    a, b [T,H,D] are normalised results, lse_a, lse_b [T,H] float32 their natural logarithms of sums
    (arXiv:2501.01005, section 2.2). Where both are -inf: zeros and -inf.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    share_a, share_b = ((x - shift).exp().to(wide)[..., None] for x in (lse_a, lse_b))
    return (a.to(wide) * share_a + b.to(wide) * share_b).to(a.dtype), lse


define(
    "attention_gqa",
    "(q[T,Hq,D], key_cache[P,page_size,Hk,...], value_cache[P,page_size,Hk,...], "
    "page_table[S,M] int32, slots[R] int32 >= 0, q_start[R+1] int32 >= 0, kv_len[R] int32 >= 0, "
    "scale, window=0) -> [T,Hq,Dv]",
    attention_gqa,
)
define(
    "attention_mla",
    "(q_latent[T,H,L], q_pe[T,H,Dr], cache[P,page_size,...], page_table[S,M] int32, "
    "slots[R] int32 >= 0, q_start[R+1] int32 >= 0, kv_len[R] int32 >= 0, scale) -> [T,H,L]",
    attention_mla,
)
define(
    "attention_ragged",
    "(q[T,Hq,D], k[S,Hk,D], v[S,Hk,Dv], q_start[R+1] int32 >= 0, k_start[R+1] int32 >= 0, scale, "
    "causal=True, q_tail[T,Hq,Dr]=None, k_tail[S,Dr]=None) -> (out[T,Hq,Dv], lse[T,Hq] f32)",
    attention_ragged,
)
define(
    "merge_state",
    "(a[T,H,D], lse_a[T,H] f32, b[T,H,D], lse_b[T,H] f32) -> (out[T,H,D], lse[T,H] f32)",
    merge_state,
)
