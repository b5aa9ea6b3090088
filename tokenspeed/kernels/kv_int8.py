# SPDX-License-Identifier: MIT
"""Keys and values held as int8: the layout of such a cache's rows. Knows no attention.

A row of D features becomes D + 4 uint8: D times int8, then the float32 scale absmax / 127 of that
token and head. A feature's value is int8 * scale.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4


def pack_int8(x: Tensor) -> Tensor:
    """[..., D] of any float dtype -> uint8 [..., D + 4], rounded to nearest even."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    whole = (wide * inverse).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([whole.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpack_int8(rows: Tensor) -> Tensor:
    """uint8 [..., D + 4] -> float32 [..., D]."""
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :-SCALE_BYTES].contiguous().view(torch.int8).float() * scale
