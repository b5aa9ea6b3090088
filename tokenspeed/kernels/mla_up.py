# SPDX-License-Identifier: MIT
"""Latent attention together with the value up-projection: signature and torch reference.

A backend that merges partial results may bring them back from the latent in the same kernel. No
layer asks for it yet. Knows no layers.
"""

import torch
from torch import Tensor

from tokenspeed.kernels.attention import attention_mla
from tokenspeed.kernels.registry import define


def attention_mla_up(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    w_uv: Tensor,
) -> Tensor:
    """As `attention_mla`, then w_uv[H,Dv,L] on each head's [L]: [T,H,Dv]."""
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    y = attention_mla(
        q_latent.to(wide), q_pe.to(wide), cache, page_table, slots, q_start, kv_len, scale
    )
    return torch.einsum("thl,hvl->thv", y, w_uv.to(wide)).to(q_latent.dtype)


define(
    "attention_mla_up",
    "(q_latent[T,H,L], q_pe[T,H,Dr], cache[P,page_size,...], page_table[S,M] int32, "
    "slots[R] int32 >= 0, q_start[R+1] int32 >= 0, kv_len[R] int32 >= 0, scale, w_uv[H,Dv,L]) "
    "-> [T,H,Dv]",
    attention_mla_up,
)
