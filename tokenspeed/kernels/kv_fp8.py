# SPDX-License-Identifier: MIT
"""Rows of the latent cache in float8: their layout, and the reference that packs and unpacks them.

A row of 512 latent and 64 rotated features takes 656 bytes: 512 e4m3 codes, 4 float32 scales (each
of 128 codes, the largest magnitude / 448; 1 for a group of zeros), 64 bfloat16 features with
position, which stay as they are. Knows no attention and no pages.
"""

import torch
from torch import Tensor

LATENT, ROPE, GROUP = 512, 64, 128
PARTS = [LATENT, 4 * (LATENT // GROUP), 2 * ROPE]  # bytes of codes, scales, rope
ROW_BYTES = sum(PARTS)  # 656
LARGEST_CODE = 448.0


def pack_fp8(latent: Tensor, rope: Tensor) -> Tensor:
    """latent [..., 512], rope [..., 64] -> uint8 [..., 656]."""
    groups = latent.float().reshape(*latent.shape[:-1], LATENT // GROUP, GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / LARGEST_CODE
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (groups / scales).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
    parts = (codes.flatten(-2), scales.squeeze(-1), rope.to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_fp8(rows: Tensor) -> Tensor:
    """uint8 [..., 656] -> float32 [..., 576], the latent first."""
    codes, scales, rope = torch.split_with_sizes(rows, PARTS, -1)
    values = codes.contiguous().view(torch.float8_e4m3fn).float()
    groups = values.reshape(*values.shape[:-1], LATENT // GROUP, GROUP)
    latent = groups * scales.contiguous().view(torch.float32)[..., None]
    return torch.cat([latent.flatten(-2), rope.contiguous().view(torch.bfloat16).float()], dim=-1)
