# SPDX-License-Identifier: MIT
"""Windows, int8 rows, keys in line and merged states against references, over poisoned memory."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import Ragged, close, ragged
from tokenspeed import _cpu
from tokenspeed.kernels.attention import attention_gqa, attention_ragged, merge_state
from tokenspeed.kernels.kv_int8 import pack_int8, unpack_int8
from tokenspeed.kernels.latent import gather_latent
from tokenspeed.kernels.rope import rope_append_gqa

ROWS = [(1, 1), (1, 65), (2, 17), (3, 300), (7, 600), (70, 129), (16, 530), (1, 300), (4, 280)]
DTYPES = [torch.float32, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 64, 257])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (4, 1), (6, 3), (12, 1)])
def test_windows(isa: str, window: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    batch = ragged(ROWS, 16)
    q = rand(batch.num_tokens, heads, 64, dtype=dtype)
    keys, values = (batch.cache(kv_heads, 64, dtype=dtype, seed=s) for s in (2, 3))
    expected = attention_gqa(q, keys, values, *batch.tables(), 0.125, window)
    close(_cpu.attention_gqa(q, keys, values, *batch.tables(), 0.125, window), expected, dtype)


def packed(cache: Tensor) -> Tensor:
    """Rows that must not be read have a scale of NaN."""
    return pack_int8(cache.nan_to_num()).where(~cache[..., :1].isnan(), 255)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (16, 8, 128), (6, 1, 40)])
def test_int8_rows(isa: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    batch = ragged(ROWS, 16)
    q = rand(batch.num_tokens, heads, dim, dtype=dtype)
    caches = [packed(batch.cache(kv_heads, dim, dtype=dtype, seed=s)) for s in (2, 3)]
    expected = attention_gqa(q, *caches, *batch.tables(), dim**-0.5)
    close(_cpu.attention_gqa(q, *caches, *batch.tables(), dim**-0.5), expected, dtype)


def by_head(cache: Tensor) -> Tensor:
    """The same cache, each head's rows of a page one after the other."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.uint8])
def test_heads_may_lie_apart(isa: str, held: torch.dtype) -> None:
    """Same bits, and rows are appended to the same places, by kernel and reference."""
    dtype, dim = torch.float32 if held == torch.float32 else torch.bfloat16, 64
    batch = ragged(ROWS, 16)
    pages = [batch.cache(2, dim, dtype=dtype, seed=s) for s in (2, 3)]
    if held == torch.uint8:
        pages = [packed(cache) for cache in pages]
    q, k, v = (rand(3, heads, dim, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    angles, positions = rand(9, 16, dtype=torch.float32), torch.tensor([0, 3, 8]).int()
    index = torch.arange(3) * 17  # pages and places of all kinds
    for append in (_cpu.rope_append_gqa, rope_append_gqa):
        dense, apart = [cache.clone() for cache in pages], [by_head(cache) for cache in pages]
        for caches in (dense, apart):
            append(q, k, v, angles, positions, index, *caches, False)
        for one, other, before in zip(dense, apart, pages, strict=True):
            assert not other.is_contiguous()
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            assert not torch.equal(one[0, 0], before[0, 0])
    q = rand(batch.num_tokens, 4, dim, dtype=dtype)
    found = _cpu.attention_gqa(q, *(by_head(cache) for cache in pages), *batch.tables(), 0.125)
    assert torch.equal(found, _cpu.attention_gqa(q, *pages, *batch.tables(), 0.125))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_append_is_the_references(isa: str, dtype: torch.dtype) -> None:
    """Codes may differ by one where products of the rotation were rounded otherwise."""
    q, k, v = (rand(5, heads, 24, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    v[3] = 0
    angles = rand(9, 16, dtype=torch.float32)
    positions = torch.tensor([0, 3, 8, 1, 2], dtype=torch.int32)
    index = torch.tensor([7, 0, 3, 12, 15])
    ours, theirs = ([torch.full((4, 4, 2, 28), 9, dtype=torch.uint8) for _ in "kv"] for _ in "ab")
    turned = _cpu.rope_append_gqa(q, k, v, angles, positions, index, *ours, False)
    close(turned, rope_append_gqa(q, k, v, angles, positions, index, *theirs, False), dtype)
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.view(16, 2, 28), b.view(16, 2, 28)
        scale = b[index][..., 24:].contiguous().view(torch.float32).max()
        difference = (unpack_int8(a[index]) - unpack_int8(b[index])).abs().max()
        assert difference <= scale * (1.01 if dtype == torch.float32 else 2.01)
        untouched = torch.ones(16, dtype=torch.bool)
        untouched[index] = False
        assert (a[untouched] == 9).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_append_shows_what_is_not_finite(isa: str, value: float) -> None:
    q, k, v = (rand(2, 2, 24, dtype=torch.float32, seed=s) for s in (1, 2, 3))
    v[1, 0, 5] = value
    caches = [torch.zeros((1, 4, 2, 28), dtype=torch.uint8) for _ in "kv"]
    angles, positions = torch.ones(2, 16), torch.zeros(2, dtype=torch.int32)
    _cpu.rope_append_gqa(q, k, v, angles, positions, torch.tensor([0, 1]), *caches, False)
    rows = unpack_int8(caches[1][0, :2])
    assert not rows[1, 0].isfinite().any()
    assert rows[1, 1].isfinite().all()
    assert rows[0].isfinite().all()


def in_line(batch: Ragged, extra: int) -> tuple[Tensor, Tensor]:
    lengths = [int(n) + extra for n in batch.kv_len]
    k_start = torch.tensor([0, *lengths]).cumsum(0).int()
    return batch.q_start, k_start


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tail", "value_dim"),
    [(4, 4, 128, 64, 128), (4, 2, 32, 0, 48), (3, 3, 7, 5, 9), (2, 1, 64, 16, 64)],
)
def test_keys_in_line(
    isa: str,
    heads: int,
    kv_heads: int,
    dim: int,
    tail: int,
    value_dim: int,
    causal: bool,
    dtype: torch.dtype,
) -> None:
    """Keys and values are slices of one tensor; some queries of the shortest rows see nothing."""
    batch = ragged([(5, 6), (1, 40), (70, 333), (33, 34)], 16)
    q_start, k_start = in_line(batch, -3)
    num_keys = int(k_start[-1])
    q = rand(batch.num_tokens, heads, dim, dtype=dtype)
    both = rand(num_keys, kv_heads, dim + value_dim, dtype=dtype, seed=2)
    k, v = both[..., :dim], both[..., dim:]
    tails: tuple[Tensor, ...] = ()
    if tail:
        shared = rand(num_keys, 3 + tail, dtype=dtype, seed=4)[:, 3:]
        tails = rand(batch.num_tokens, heads, tail, dtype=dtype, seed=3), shared
    call = (q, k, v, q_start, k_start, 0.1, causal, *tails)
    out, lse = _cpu.attention_ragged(*call)
    expected, expected_lse = attention_ragged(*call)
    close(out, expected, dtype)
    # The sum is of weights rounded to the dtype, as the result is.
    atol = 1e-4 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=atol)
    if causal:
        assert (lse[:2] == -torch.inf).all()
        assert (out[:2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_states_are_attention_over_both(isa: str, dtype: torch.dtype) -> None:
    a, b = (rand(9, 3, 20, dtype=dtype, seed=s) for s in (1, 2))
    lse_a, lse_b = (rand(9, 3, dtype=torch.float32, seed=s) * 30 for s in (3, 4))
    lse_a[:2] = -torch.inf
    lse_b[1:3] = -torch.inf
    a[:2], b[1:3] = 0, 0
    out, lse = _cpu.merge_state(a, lse_a, b, lse_b)
    expected, expected_lse = merge_state(a, lse_a, b, lse_b)
    close(out, expected, dtype)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[0], b[0])
    assert (lse[1] == -torch.inf).all()


def test_latents_in_line(isa: str) -> None:
    batch = ragged([(1, 40), (3, 17), (2, 90)], 16)
    cache = batch.cache(36, dtype=torch.bfloat16, seed=2)
    first = torch.tensor([5, 0, 89], dtype=torch.int32)
    starts = torch.tensor([0, 35, 35, 36], dtype=torch.int32)
    for dtype in DTYPES:
        call = (cache, batch.page_table, batch.slots, first, starts, 36, dtype)
        found = _cpu.gather_latent(*call)
        assert torch.equal(found, gather_latent(*call))
        assert not found.isnan().any()
    with pytest.raises(ValueError, match="first"):
        _cpu.gather_latent(cache, batch.page_table, batch.slots, first + 90, starts, 36, dtype)
    with pytest.raises(ValueError, match="starts"):
        _cpu.gather_latent(cache, batch.page_table, batch.slots, first, starts, 37, dtype)


def test_chunks_of_three_and_more_rows_are_the_same_bits(isa: str) -> None:
    """Rows in lanes and rows that are streamed sum in one order."""
    batch = ragged([(60, 600)], 16)
    q = rand(60, 8, 64, dtype=torch.bfloat16)
    keys, values = (batch.cache(2, 64, dtype=torch.bfloat16, seed=s) for s in (2, 3))
    whole = _cpu.attention_gqa(q, keys, values, *batch.tables(), 0.125)
    for first, last in [(0, 1), (1, 3), (3, 20), (20, 21), (59, 60)]:
        start = torch.tensor([0, last - first], dtype=torch.int32)
        length = torch.tensor([540 + last], dtype=torch.int32)
        part = _cpu.attention_gqa(
            q[first:last], keys, values, batch.page_table, batch.slots, start, length, 0.125
        )
        assert torch.equal(part, whole[first:last])
