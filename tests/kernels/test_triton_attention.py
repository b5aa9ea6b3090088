# SPDX-License-Identifier: MIT
"""Triton's attention over paged caches against the references, over NaN-poisoned memory."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import Ragged, close, ragged
from tokenspeed.kernels import select
from tokenspeed.kernels.kv_fp8 import pack_fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16
FULL_F32 = pytest.param(F32, marks=pytest.mark.full)  # the same in float32: in the full suite
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
@pytest.mark.parametrize("heads", [16, 32, 64, 5, pytest.param(128, marks=pytest.mark.full)])
def test_mla_decode(dtype: torch.dtype, page_size: int, heads: int) -> None:
    batch = ragged(HARD_ROWS if heads < 64 else HARD_ROWS[:5], page_size)
    close(*mla(batch, heads, dtype, max_q_len=8), dtype)


@pytest.mark.parametrize("dtype", [FULL_F32, BF16])
@pytest.mark.parametrize("max_q_len", [0, 40])
def test_mla_chunks_among_decodes(dtype: torch.dtype, max_q_len: int) -> None:
    close(*mla(ragged(MIXED_ROWS, 16), 5, dtype, max_q_len=max_q_len), dtype)
    close(*mla(ragged([(40, 100)], 64), 16, dtype), dtype)


def test_wrong_guesses_cost_time_only() -> None:
    """Rows that are not what an even batch looks like, and rows longer than the hint says."""
    uneven = ragged([(5, 9), (1, 70), (0, 0), (2, 2)], 16)
    close(*mla(uneven, 16, BF16), BF16)
    close(*gqa(uneven, (4, 2), (32, 32), BF16), BF16)
    close(*mla(ragged([(20, 30), (1, 3), (11, 11)], 16), 5, BF16, max_q_len=2), BF16)


@pytest.mark.full
def test_mla_at_128k() -> None:
    batch = ragged([(2, 131072)], 64)
    close(*mla(batch, 16, BF16, latent_dim=512, rope_dim=64), BF16)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(F32, BF16), (BF16, F32)])
def test_mla_cache_of_another_type(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    close(*mla(ragged(HARD_ROWS[:4], 64), 16, dtype, cache_dtype), dtype)


@pytest.mark.parametrize("dtype", [FULL_F32, BF16])
def test_mla_of_deepseek_at_length(dtype: torch.dtype) -> None:
    batch = ragged([(1, 1000), (4, 300)], 64)
    close(*mla(batch, 16, dtype, latent_dim=512, rope_dim=64, max_q_len=4), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("page_size", [16, 64])
def test_float8_latents(dtype: torch.dtype, page_size: int) -> None:
    """Attention over them, and put in line; bytes that nobody owns are NaN as codes and scales."""
    batch = ragged([(1, 65), (4, 100), (2, 3)], page_size)
    plain = batch.cache(576, dtype=F32, seed=5)
    free = plain[..., 0].isnan()
    packed = pack_fp8(*plain.nan_to_num().split([512, 64], dim=-1))
    packed[free] = 255
    cache, tables = packed.to(DEVICE), on_device(batch)
    q = rand(batch.num_tokens, 5, 512, dtype=dtype)
    pe = rand(batch.num_tokens, 5, 64, dtype=dtype, seed=4)
    first = torch.zeros_like(tables[3])
    lines = (cache, *tables[:2], first, starts(tables[3].tolist()), int(tables[3].sum()), dtype)
    for op, arguments in (
        ("attention_mla", (q, pe, cache, *tables, 0.05)),
        ("gather_latent", lines),
    ):
        actual, expected = (
            select(op, device=DEVICE, dtype=dtype, backend=b)(*arguments)
            for b in ("triton", "reference")
        )
        close(actual, expected, dtype)


@pytest.mark.skipif(DEVICE != "cpu", reason="codes are made on the CPU")
def test_every_float8_code_widens_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    row = torch.zeros(1, 1, 656, dtype=torch.uint8)
    row[..., :256], row[..., 512:528] = codes, torch.ones(4).view(torch.uint8)
    one = torch.tensor([0], dtype=torch.int32)
    run = select("gather_latent", device=DEVICE, backend="triton")
    line = run(row, one[None], one, one, starts([1]), 1, F32)
    assert torch.equal(line[0, :256], codes.view(torch.float8_e4m3fn).float())


def gqa(
    batch: Ragged,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
    max_q_len: int = 0,
) -> tuple[Tensor, Tensor]:
    """What Triton says, and the reference."""
    q = rand(batch.num_tokens, heads[0], dims[0], dtype=dtype)
    kind = cache_dtype or dtype
    keys, values = (
        batch.cache(heads[1], dim, dtype=kind, seed=seed).to(DEVICE)
        for seed, dim in enumerate(dims)
    )
    arguments = (q, keys, values, *on_device(batch), dims[0] ** -0.5, window)
    run = select("attention_gqa", device=DEVICE, dtype=dtype, backend="triton", head_dim=dims[0])
    reference = select("attention_gqa", device=DEVICE, dtype=dtype, backend="reference")
    return run(*arguments, max_q_len=max_q_len), reference(*arguments)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("page_size", "heads", "dims"),
    [(16, (4, 2), (64, 64)), (64, (16, 8), (128, 128)), (16, (3, 3), (192, 128)),
     (16, (5, 1), (24, 20)), (1, (9, 3), (7, 5)), (64, (2, 2), (40, 192))],
)  # fmt: skip
def test_gqa_decode(
    dtype: torch.dtype, page_size: int, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    close(*gqa(ragged(HARD_ROWS, page_size), heads, dims, dtype, max_q_len=8), dtype)


@pytest.mark.parametrize("dtype", [FULL_F32, BF16])
@pytest.mark.parametrize(
    ("page_size", "heads", "dims"),
    [(16, (4, 2), (64, 64)), (64, (3, 1), (192, 128)), (16, (2, 2), (24, 20))],
)
def test_gqa_chunks_among_decodes(
    dtype: torch.dtype, page_size: int, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    close(*gqa(ragged(MIXED_ROWS, page_size), heads, dims, dtype, max_q_len=40), dtype)
    close(*gqa(ragged([(80, 150)], page_size), heads, dims, dtype), dtype)


@pytest.mark.parametrize("dtype", [FULL_F32, BF16])
@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_sliding_windows(dtype: torch.dtype, window: int) -> None:
    close(*gqa(ragged(HARD_ROWS, 16), (2, 1), (32, 32), dtype, window=window, max_q_len=8), dtype)
    close(*gqa(ragged(MIXED_ROWS, 64), (2, 1), (32, 32), dtype, window=window), dtype)


def test_gqa_caches_of_another_type() -> None:
    batch = ragged(HARD_ROWS[:4], 16)
    close(*gqa(batch, (4, 2), (64, 64), F32, BF16), F32)
    close(*gqa(batch, (4, 2), (64, 64), BF16, F32), BF16)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "dims", "tail"),
    [
        ((4, 2), (64, 64), 0),
        ((3, 3), (192, 128), 0),
        ((2, 2), (128, 128), 64),
        ((5, 1), (20, 24), 16),
    ],
)  # fmt: skip
def test_keys_in_line(
    dtype: torch.dtype, causal: bool, heads: tuple[int, int], dims: tuple[int, int], tail: int
) -> None:
    """With rows that see nothing, and queries before the first key."""
    q_lens, k_lens = [1, 40, 3, 0, 7, 5], [65, 40, 0, 9, 100, 2]
    num_q, num_k = sum(q_lens), sum(k_lens)
    q = rand(num_q, heads[0], dims[0], dtype=dtype)
    fused = rand(num_k, heads[1], sum(dims), dtype=dtype, seed=2)
    k, v = fused.split(list(dims), dim=-1)
    tails = (None, None)
    if tail:
        tails = (
            rand(num_q, heads[0], tail, dtype=dtype, seed=3),
            rand(num_k, tail, dtype=dtype, seed=4),
        )
    arguments = (q, k, v, starts(q_lens), starts(k_lens), dims[0] ** -0.5, causal, *tails)
    (actual, lse), (expected, expected_lse) = (
        select("attention_ragged", device=DEVICE, dtype=dtype, backend=b)(*arguments)
        for b in ("triton", "reference")
    )
    close(actual, expected, dtype)
    close(lse, expected_lse, dtype)
    assert lse[41:44].isneginf().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_merged_states(dtype: torch.dtype) -> None:
    a, b = (rand(9, 3, 40, dtype=dtype, seed=s) for s in (1, 2))
    lse_a, lse_b = (rand(9, 3, dtype=F32, seed=s) * 20 for s in (3, 4))
    lse_a[0], lse_b[1], lse_a[2], lse_b[2] = (float("-inf"),) * 4
    a[2], b[2] = 0, 0
    lse_a[3], lse_b[3] = 40.0, 37.0
    merged, expected = (
        select("merge_state", device=DEVICE, dtype=dtype, backend=x)(a, lse_a, b, lse_b)
        for x in ("triton", "reference")
    )
    close(merged[0], expected[0], dtype)
    close(merged[1], expected[1], F32)


@pytest.mark.parametrize(("cache_dtype", "dtype"), [(F32, F32), (BF16, BF16), (F32, BF16)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_latents_in_line(cache_dtype: torch.dtype, dtype: torch.dtype, page_size: int) -> None:
    batch = ragged([(1, 65), (1, 100), (1, 3), (1, 20), (1, 1)], page_size)
    cache = batch.cache(64 + 16, dtype=cache_dtype, seed=5).to(DEVICE)
    table, slots, _, kv_len = on_device(batch)
    first = torch.tensor([0, 37, 1, 20, 0], dtype=torch.int32, device=DEVICE)
    lengths = (kv_len - first).tolist()
    arguments = (cache, table, slots, first, starts(lengths), sum(lengths), dtype)
    actual, expected = (
        select("gather_latent", device=DEVICE, dtype=dtype, backend=b)(*arguments)
        for b in ("triton", "reference")
    )
    assert torch.equal(actual, expected)
