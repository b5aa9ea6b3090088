# SPDX-License-Identifier: MIT
"""What a layer stores per token in the paged KV cache. Knows shapes, not who allocates them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheSpec:
    """One layer's cache: a tuple of tensors, each [num_pages, page_size, *shape].

    Grouped-query attention keeps (keys, values) of shape (num_kv_heads, head_dim), of int8 those
    and a scale as bytes (`kernels/kv_int8.py`); multi-head
    latent attention keeps one tensor of shape (kv_lora_rank + qk_rope_head_dim,).
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    def bytes_per_token(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes) * self.dtype.itemsize
