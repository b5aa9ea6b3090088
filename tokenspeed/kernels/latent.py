# SPDX-License-Identifier: MIT
"""Rows of the paged latent cache put in line: signature and torch reference.

For multi-head latent attention in its materialised form, where keys and values of every head are
made from the latents of many tokens at once. Knows no attention.
"""

import torch
from torch import Tensor

from tokenspeed.kernels.attention import gather_rows
from tokenspeed.kernels.kv_fp8 import LATENT, ROPE, unpack_fp8
from tokenspeed.kernels.registry import define


def gather_latent(
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    first: Tensor,
    starts: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """cache [num_pages, page_size, C] -> [num_rows, C] in `dtype`; float8 rows are unpacked.

    Row r of the batch gives starts[r+1] - starts[r] positions of its sequence, from first[r] on, as
    rows [starts[r], starts[r+1]) of the result. `num_rows` is starts[-1], known to the host.
    `page_table` [num_slots, max_pages], `slots`, `first` [R] and `starts` [R+1] are int32.
    """
    packed = cache.dtype == torch.uint8
    width = LATENT + ROPE if packed else cache.shape[2]
    out = torch.empty(num_rows, width, dtype=dtype, device=cache.device)
    bounds = starts.tolist()
    for row, (slot, begin) in enumerate(zip(slots.tolist(), first.tolist(), strict=True)):
        rows = slice(bounds[row], bounds[row + 1])
        end = begin + bounds[row + 1] - bounds[row]
        found = gather_rows(cache, page_table[slot], begin, end)
        out[rows] = (unpack_fp8(found) if packed else found).to(dtype)
    return out


define(
    "gather_latent",
    "(cache[P,page_size,...], page_table[S,M] int32, slots[R] int32 >= 0, first[R] int32 >= 0, "
    "starts[R+1] int32 >= 0, num_rows, dtype) -> [num_rows,C]",
    gather_latent,
)
