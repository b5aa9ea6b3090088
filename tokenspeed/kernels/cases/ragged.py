# SPDX-License-Identifier: MIT
"""Ragged batches over paged caches in which everything that must not be read is poison.

What a row's sequence owns is random; page tails are NaN, pages that nobody owns NaN or infinite.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Ragged:
    """Rows of (q_len, kv_len), their pages scattered over a pool that has spare pages."""

    page_table: Tensor
    slots: Tensor
    q_start: Tensor
    kv_len: Tensor
    positions: Tensor  # [T] of the query tokens
    cache_index: Tensor  # [T]
    num_pages: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        return int(self.q_start[-1])

    def cache(self, *shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
        """[num_pages, page_size, *shape]: random where a row's sequence stands, else poison."""
        made = torch.full((self.num_pages, self.page_size, *shape), NAN, dtype=dtype)
        made[1::2] = INF
        noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed)) * scale
        for slot, length in zip(self.slots.tolist(), self.kv_len.tolist(), strict=True):
            at = torch.arange(length)
            page, offset = self.page_table[slot].long()[at // self.page_size], at % self.page_size
            made[self.page_table[slot, : -(-length // self.page_size)].long()] = NAN
            made[page, offset] = noise[page, offset].to(dtype)
        return made

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.page_table, self.slots, self.q_start, self.kv_len

    def row(self, index: int) -> "Ragged":
        """The same pool with one row only."""
        first, last = int(self.q_start[index]), int(self.q_start[index + 1])
        return Ragged(
            self.page_table,
            self.slots[index : index + 1],
            torch.tensor([0, last - first], dtype=torch.int32),
            self.kv_len[index : index + 1],
            self.positions[first:last],
            self.cache_index[first:last],
            self.num_pages,
            self.page_size,
        )


def ragged(rows: Sequence[tuple[int, int]], page_size: int, seed: int = 0) -> Ragged:
    """rows: (q_len, kv_len), q_len <= kv_len."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-kv // page_size) for _, kv in rows]
    num_pages = sum(needed) + 3
    shuffled = torch.randperm(num_pages, generator=generator).tolist()
    num_slots = len(rows) + 2
    slots = torch.randperm(num_slots, generator=generator)[: len(rows)]
    page_table = torch.full((num_slots, max(needed, default=0) + 1), -1, dtype=torch.int32)
    positions, indices = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int64)]
    for slot, (q_len, kv_len), count in zip(slots.tolist(), rows, needed, strict=True):
        pages = torch.tensor([shuffled.pop() for _ in range(count)])
        page_table[slot, :count] = pages.int()
        position = torch.arange(kv_len - q_len, kv_len)
        positions.append(position.int())
        indices.append(pages[position // page_size] * page_size + position % page_size)
    return Ragged(
        page_table,
        slots.int(),
        starts([q for q, _ in rows]),
        torch.tensor([kv for _, kv in rows], dtype=torch.int32),
        torch.cat(positions),
        torch.cat(indices),
        num_pages,
        page_size,
    )


def starts(lengths: Sequence[int]) -> Tensor:
    """[R + 1] int32: where each row begins, and the end of the last."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
