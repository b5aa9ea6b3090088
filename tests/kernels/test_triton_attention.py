# SPDX-License-Identifier: MIT
"""Triton's attention over paged caches against the references, over NaN-poisoned memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import Ragged, close, ragged
from tokenspeed.kernels import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16
HARD_ROWS = [(1, 1), (1, 64), (2, 65), (4, 17), (1, 130), (8, 300), (3, 3)]
MIXED_ROWS = [(1, 65), (40, 100), (1, 1), (33, 33), (2, 200)]


def rand(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def on_device(batch: Ragged) -> tuple[Tensor, ...]:
    return tuple(table.to(DEVICE) for table in batch.tables())


def mla(
    batch: Ragged,
    heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    latent_dim: int = 64,
    rope_dim: int = 16,
    max_q_len: int = 0,
) -> tuple[Tensor, Tensor]:
    """What Triton says, and the reference."""
    q = rand(batch.num_tokens, heads, latent_dim, dtype=dtype)
    pe = rand(batch.num_tokens, heads, rope_dim, dtype=dtype, seed=4)
    cache = batch.cache(latent_dim + rope_dim, dtype=cache_dtype or dtype, seed=5).to(DEVICE)
    scale = (latent_dim + rope_dim) ** -0.5
    arguments = (q, pe, cache, *on_device(batch), scale)
    run = select("attention_mla", device=DEVICE, dtype=dtype, backend="triton", rope_dim=rope_dim)
    reference = select("attention_mla", device=DEVICE, dtype=dtype, backend="reference")
    return run(*arguments, max_q_len=max_q_len), reference(*arguments)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("heads", [16, 32, 64, 128, 5])
def test_mla_decode(dtype: torch.dtype, page_size: int, heads: int) -> None:
    batch = ragged(HARD_ROWS if heads < 64 else HARD_ROWS[:5], page_size)
    close(*mla(batch, heads, dtype, max_q_len=8), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("max_q_len", [0, 40])
def test_mla_chunks_among_decodes(dtype: torch.dtype, max_q_len: int) -> None:
    close(*mla(ragged(MIXED_ROWS, 16), 5, dtype, max_q_len=max_q_len), dtype)
    close(*mla(ragged([(40, 100)], 64), 16, dtype), dtype)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(F32, BF16), (BF16, F32)])
def test_mla_cache_of_another_type(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    close(*mla(ragged(HARD_ROWS[:4], 64), 16, dtype, cache_dtype), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_mla_of_deepseek_at_length(dtype: torch.dtype) -> None:
    batch = ragged([(1, 2000), (4, 777)], 64)
    close(*mla(batch, 16, dtype, latent_dim=512, rope_dim=64, max_q_len=4), dtype)
