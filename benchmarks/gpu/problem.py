# SPDX-License-Identifier: MIT
"""The tensors of one shape of latent attention, and the true result. Knows no kernel and no peer.

Several caches of the same content's kind stand side by side, so that calls in turn read memory and
not what the call before left in the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.shapes import LATENT, PAGE, ROPE, ROW_BYTES, MlaShape
from tokenspeed.kernels.attention import attention_mla
from tokenspeed.kernels.kv_fp8 import pack_fp8, unpack_fp8

ROTATION_BYTES = 512 << 20
LAYERS = 27


@dataclass(frozen=True)
class MlaProblem:
    """Operands on a device; `caches` rotate."""

    shape: MlaShape
    q_latent: Tensor  # [T, H, 512]
    q_pe: Tensor  # [T, H, 64]
    caches: list[Tensor]  # [pages, 64, 576] bfloat16 or [pages, 64, 656] uint8
    page_table: Tensor  # [batch, pages of the longest] int32
    slots: Tensor
    q_start: Tensor
    kv_len: Tensor
    scale: float

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.page_table, self.slots, self.q_start, self.kv_len

    def truth(self) -> Tensor:
        """The reference's result on the first cache, in float32: [T, H, 512]."""
        cache = self.caches[0]
        rows = []
        wide = unpack_fp8 if cache.dtype == torch.uint8 else Tensor.float
        for row, length in enumerate(self.shape.lengths()):
            pages = self.page_table[row, : -(-length // PAGE)].long()
            table = torch.arange(len(pages), dtype=torch.int32, device=cache.device)[None]
            first, last = row * self.shape.q_len, (row + 1) * self.shape.q_len
            start = torch.tensor([0, last - first], dtype=torch.int32)
            one = torch.zeros(1, dtype=torch.int32)
            q = self.q_latent[first:last].float(), self.q_pe[first:last].float()
            kv_len = torch.tensor([length], dtype=torch.int32)
            rows.append(
                attention_mla(*q, wide(cache[pages]), table, one, start, kv_len, self.scale)
            )
        return torch.cat(rows)


def page_table(shape: MlaShape) -> tuple[Tensor, int]:
    """(table [batch, pages], pages in all): scattered, the leading ones common where shared."""
    generator = torch.Generator().manual_seed(1)
    needed = [-(-length // PAGE) for length in shape.lengths()]
    shuffled = torch.randperm(sum(needed), generator=generator).int()
    table = torch.zeros(shape.batch, max(needed), dtype=torch.int32)
    at = 0
    for row, count in enumerate(needed):
        table[row, :count] = shuffled[at : at + count]
        at += count
    if shape.shared:
        common = (shape.kv_len - 1) // PAGE
        table[:, :common] = table[0, :common]
    return table, sum(needed)


def make(shape: MlaShape, device: str) -> MlaProblem:
    """Random operands of a shape."""
    generator = torch.Generator(device=device).manual_seed(2)

    def normal(*sizes: int) -> Tensor:
        made = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32)
        return made.to(torch.bfloat16)

    table, pages = page_table(shape)
    size = pages * PAGE * ROW_BYTES[shape.cache]
    caches = []
    for _ in range(min(LAYERS, max(1, -(-ROTATION_BYTES // size)))):
        cache = normal(pages, PAGE, LATENT + ROPE)
        if shape.cache == "float8":
            cache = pack_fp8(cache[..., :LATENT], cache[..., LATENT:])
        caches.append(cache)
    tokens = shape.batch * shape.q_len
    return MlaProblem(
        shape,
        normal(tokens, shape.heads, LATENT),
        normal(tokens, shape.heads, ROPE),
        caches,
        table.to(device),
        torch.arange(shape.batch, dtype=torch.int32, device=device),
        torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.q_len,
        torch.tensor(shape.lengths(), dtype=torch.int32, device=device),
        192**-0.5,
    )
