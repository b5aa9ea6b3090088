# SPDX-License-Identifier: MIT
"""Latents held as float8: the layout of such a cache's rows. Knows no attention.

    | latent: L e4m3 | L / 128 float32 scales | rotated key: R bfloat16 |

656 bytes for L = 512 and R = 64. A feature's value is its e4m3 number times its group's scale,
which is absmax / 448 (1 for a group of zeros). Numbers round to nearest even.
"""

import torch
from torch import Tensor

GROUP = 128
_LARGEST = 448.0


def row_bytes(latent_dim: int, rope_dim: int) -> int:
    """Of one token. `ValueError`: the latent is no whole number of groups, or the key odd."""
    if latent_dim % GROUP or rope_dim % 8:
        raise ValueError(
            f"float8 latents take L % {GROUP} == 0 and R % 8 == 0, not L={latent_dim}, R={rope_dim}"
        )
    return latent_dim + 4 * (latent_dim // GROUP) + 2 * rope_dim


def latent_dim_of(num_bytes: int, rope_dim: int) -> int:
    """L of rows of this many bytes."""
    return (num_bytes - 2 * rope_dim) * GROUP // (GROUP + 4)


def pack_fp8(latent: Tensor, k_pe: Tensor) -> Tensor:
    """latent [..., L], k_pe [..., R] of any float dtype -> uint8 [..., row_bytes(L, R)]."""
    row_bytes(latent.shape[-1], k_pe.shape[-1])
    groups = latent.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    codes = (groups / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    parts = [codes.flatten(-2), scale.squeeze(-1), k_pe.to(torch.bfloat16)]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_fp8(rows: Tensor, rope_dim: int) -> Tensor:
    """uint8 [..., row_bytes(L, R)] -> float32 [..., L + R]."""
    latent_dim = latent_dim_of(rows.shape[-1], rope_dim)
    sizes = [latent_dim, 4 * (latent_dim // GROUP), 2 * rope_dim]
    codes, scales, key = (part.contiguous() for part in rows.split(sizes, dim=-1))
    groups = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, GROUP))
    latent = groups * scales.view(torch.float32)[..., None]
    return torch.cat([latent.flatten(-2), key.view(torch.bfloat16).float()], dim=-1)
