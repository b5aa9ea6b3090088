# SPDX-License-Identifier: MIT
"""Ragged batches over paged caches in which everything that must not be read is NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def cache(self, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
        """[num_pages, page_size, *shape]: random where a row's sequence stands, else NaN."""
        made = torch.full((self.num_pages, self.page_size, *shape), float("nan"), dtype=dtype)
        noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed))
        for slot, length in zip(self.slots.tolist(), self.kv_len.tolist(), strict=True):
            at = torch.arange(length)
            page, offset = self.page_table[slot].long()[at // self.page_size], at % self.page_size
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


def ragged(rows: list[tuple[int, int]], page_size: int, seed: int = 0) -> Ragged:
    """rows: (q_len, kv_len), q_len <= kv_len."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-kv // page_size) for _, kv in rows]
    num_pages = sum(needed) + 3
    shuffled = torch.randperm(num_pages, generator=generator).tolist()
    num_slots = len(rows) + 2
    slots = torch.randperm(num_slots, generator=generator)[: len(rows)]
    page_table = torch.full((num_slots, max(needed) + 1), -1, dtype=torch.int32)
    positions, indices = [], []
    for slot, (q_len, kv_len), count in zip(slots.tolist(), rows, needed, strict=True):
        pages = torch.tensor([shuffled.pop() for _ in range(count)])
        page_table[slot, :count] = pages.int()
        position = torch.arange(kv_len - q_len, kv_len)
        positions.append(position.int())
        indices.append(pages[position // page_size] * page_size + position % page_size)
    lengths = torch.tensor([0] + [q for q, _ in rows])
    return Ragged(
        page_table,
        slots.int(),
        lengths.cumsum(0).int(),
        torch.tensor([kv for _, kv in rows], dtype=torch.int32),
        torch.cat(positions),
        torch.cat(indices),
        num_pages,
        page_size,
    )


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within 1e-5 (float32) or 2e-2 (bfloat16), relative to the values' own size."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
