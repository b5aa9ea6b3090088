# SPDX-License-Identifier: MIT
"""Latent attention of requests that share leading pages: signatures and torch references.

Agents that work on one repository send the same first 50K tokens. Rows of the batch that stand next
to each other and whose sequences begin with the same pages form a group; a kernel may read those
pages once, under the queries of all of the group. What is shared is found by comparing page ids, so
it is never wrong. Knows no layers.
"""

import torch
from torch import Tensor

from tokenspeed.kernels.attention import attention_mla
from tokenspeed.kernels.registry import define

TILE = 64  # keys that the third column counts
MIN_TILES = 8  # fewer are not worth a merge


def prefix_groups(
    page_table: Tensor, slots: Tensor, q_start: Tensor, kv_len: Tensor, page_size: int
) -> Tensor:
    """[R, 3] int32: each row's group [leader, end) and the tiles of 64 keys that all of it share.

    Only pages before the first query of each row count. A row joins the group of the row before it
    if they have at least 8 tiles in common, and at least half of what the group has so far. A row
    alone is (r, r + 1, 0). `ValueError`: pages that are not whole tiles.
    """
    if page_size % TILE:
        raise ValueError(f"prefix_groups: page_size {page_size} is no multiple of {TILE}")
    limits = ((kv_len - q_start.diff()) // page_size).where(q_start.diff() > 0, 0)
    rows, tiles_a_page = len(slots), page_size // TILE
    found: list[tuple[int, int, int]] = []
    leader, shared = 0, 0
    for row in range(1, rows + 1):
        common = 0
        if row < rows:
            limit = int(torch.minimum(limits[row - 1], limits[row]))
            above, below = (page_table[int(slots[r]), :limit] for r in (row - 1, row))
            common = int((above == below).long().cumprod(0).sum()) * tiles_a_page
        if common < MIN_TILES or 2 * common < shared:
            found += [(leader, row, shared)] * (row - leader)
            leader, shared = row, 0
        else:
            shared = min(shared, common) if shared else common
    return torch.tensor(found, dtype=torch.int32, device=kv_len.device).view(rows, 3)


def attention_mla_shared(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    groups: Tensor,
) -> Tensor:
    """As `attention_mla`; `groups` [R,3] of `prefix_groups` says what need not be read twice."""
    return attention_mla(q_latent, q_pe, cache, page_table, slots, q_start, kv_len, scale)


define(
    "prefix_groups",
    "(page_table[S,M] int32, slots[R] int32 >= 0, q_start[R+1] int32 >= 0, kv_len[R] int32 >= 0, "
    "page_size) -> [R,3] int32",
    prefix_groups,
)
define(
    "attention_mla_shared",
    "(q_latent[T,H,L], q_pe[T,H,Dr], cache[P,page_size,...], page_table[S,M] int32, "
    "slots[R] int32 >= 0, q_start[R+1] int32 >= 0, kv_len[R] int32 >= 0, scale, "
    "groups[R,3] int32 >= 0) -> [T,H,L]",
    attention_mla_shared,
)
