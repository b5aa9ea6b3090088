# SPDX-License-Identifier: MIT
"""A row of n tokens gives, bit for bit, what n rows of one token give: drafts change no result."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import Ragged, ragged
from tests.kernels.test_attention_kinds import packed, rand
from tokenspeed import _cpu

FORMS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.uint8),
    (torch.bfloat16, torch.uint8),
]
LENGTHS = [250, 40]  # keys before the first token: then to the next span, and to the next block
MOST = 17


def tables(batch: Ragged, row: int, n: int, apart: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row `row` with its first n tokens; `apart`: as n rows of one token."""
    slot, length = batch.slots[row : row + 1], int(batch.kv_len[row]) - MOST
    if apart:
        steps = torch.arange(n + 1, dtype=torch.int32)
        return batch.page_table, slot.repeat(n), steps, steps[1:] + length
    start, end = torch.tensor([0, n]).int(), torch.tensor([length + n]).int()
    return batch.page_table, slot, start, end


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("dtype", "held"), FORMS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_verifying_rows(
    isa: str, group: int, dtype: torch.dtype, held: torch.dtype, window: int
) -> None:
    batch = ragged([(MOST, length + MOST) for length in LENGTHS], 16)
    q = rand(2 * MOST, 2 * group, 64, dtype=dtype)
    keys, values = (batch.cache(2, 64, dtype=dtype, seed=s) for s in (2, 3))
    if held == torch.uint8:
        keys, values = packed(keys), packed(values)
    for row in range(len(LENGTHS)):
        queries = q[row * MOST : (row + 1) * MOST]
        apart = _cpu.attention_gqa(
            queries, keys, values, *tables(batch, row, MOST, True), 0.125, window
        )
        assert apart.isfinite().all()
        for n in range(2, MOST + 1):
            together = _cpu.attention_gqa(
                queries[:n], keys, values, *tables(batch, row, n, False), 0.125, window
            )
            assert torch.equal(together, apart[:n]), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 5, 16])
def test_verifying_rows_of_latents(isa: str, heads: int, dtype: torch.dtype) -> None:
    batch = ragged([(MOST, length + MOST) for length in LENGTHS], 16)
    latent, pe = (rand(2 * MOST, heads, size, dtype=dtype, seed=size) for size in (64, 32))
    cache = batch.cache(96, dtype=dtype, seed=2)
    for row in range(len(LENGTHS)):
        own = slice(row * MOST, (row + 1) * MOST)
        apart = _cpu.attention_mla(
            latent[own], pe[own], cache, *tables(batch, row, MOST, True), 0.1
        )
        assert apart.isfinite().all()
        for n in range(2, MOST + 1):
            together = _cpu.attention_mla(
                latent[own][:n], pe[own][:n], cache, *tables(batch, row, n, False), 0.1
            )
            assert torch.equal(together, apart[:n]), n
