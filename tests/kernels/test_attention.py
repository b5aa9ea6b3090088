# SPDX-License-Identifier: MIT
"""Of paged attention what cases do not say: threads, chunks, neighbours, wrong arguments."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import Ragged, close, ragged
from tokenspeed import _cpu
from tokenspeed.kernels import select


def rand(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gqa(batch: Ragged, q: Tensor, keys: Tensor, values: Tensor, backend: str) -> Tensor:
    run = select("attention_gqa", dtype=q.dtype, backend=backend)
    out: Tensor = run(q, keys, values, *batch.tables(), q.shape[-1] ** -0.5)
    return out


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = _cpu.num_threads()
    _cpu.set_num_threads(count)
    try:
        yield
    finally:
        _cpu.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_are_split_and_merged(isa: str, dtype: torch.dtype) -> None:
    """Several spans: alone (a task per span) and in a batch (spans in turn) agree bit for bit."""
    rows = [(1, 1500), (3, 513), (40, 1100), (1, 512), (2, 9000)] + [(1, 700)] * 8
    batch = ragged(rows, 64)
    q = rand(batch.num_tokens, 2, 64, dtype=dtype)
    keys, values = (batch.cache(1, 64, dtype=dtype, seed=s) for s in (2, 3))
    with threads(2):
        together = gqa(batch, q, keys, values, "cpu")
    close(together, gqa(batch, q, keys, values, "reference"), dtype)
    for index in range(5):
        first, last = int(batch.q_start[index]), int(batch.q_start[index + 1])
        for count in (1, 8):  # with 1 the spans of the longest are merged in two goes
            with threads(count):
                alone = gqa(batch.row(index), q[first:last], keys, values, "cpu")
            assert torch.equal(alone, together[first:last])


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_streamed_rows_do_not_depend_on_threads_or_the_batch(isa: str, heads: int) -> None:
    """Decoding rows in bfloat16: short and long ones, many of them at a time."""
    batch = ragged([(1, 700), (1, 63), (1, 1), (1, 3000), (1, 256)] * 4, 64)
    q = rand(batch.num_tokens, 2 * heads, 64, dtype=torch.bfloat16)
    keys, values = (batch.cache(2, 64, dtype=torch.bfloat16, seed=s) for s in (2, 3))
    with threads(2):
        together = gqa(batch, q, keys, values, "cpu")
    close(together, gqa(batch, q, keys, values, "reference"), torch.bfloat16)
    for count in (1, 3):
        with threads(count):
            assert torch.equal(gqa(batch, q, keys, values, "cpu"), together)
            for index in range(5):
                alone = gqa(batch.row(index), q[index : index + 1], keys, values, "cpu")
                assert torch.equal(alone, together[index : index + 1])


def test_results_do_not_depend_on_threads_or_chunking(isa: str) -> None:
    batch = ragged([(90, 600)], 16)
    q = rand(90, 6, 48, dtype=torch.float32)
    keys, values = (batch.cache(3, 48, dtype=torch.float32, seed=s) for s in (2, 3))
    whole = gqa(batch, q, keys, values, "cpu")
    for count in (1, 3):
        with threads(count):
            assert torch.equal(gqa(batch, q, keys, values, "cpu"), whole)
    for first in range(0, 90, 7):
        last = min(first + 7, 90)
        table, slots = batch.page_table, batch.slots
        start = torch.tensor([0, last - first], dtype=torch.int32)
        length = torch.tensor([510 + last], dtype=torch.int32)
        part = _cpu.attention_gqa(
            q[first:last], keys, values, table, slots, start, length, 48**-0.5
        )
        assert torch.equal(part, whole[first:last])


def test_strided_queries(isa: str) -> None:
    batch = ragged([(3, 40), (1, 9)], 16)
    fused = rand(4, 5 * 32 + 11, dtype=torch.float32)
    q = fused[:, 11:].view(4, 5, 32)
    keys, values = (batch.cache(5, 32, dtype=torch.float32, seed=s) for s in (2, 3))
    expected = gqa(batch, q.contiguous(), keys, values, "reference")
    close(gqa(batch, q, keys, values, "cpu"), expected, torch.float32)


def test_a_nan_query_spoils_its_own_row_only(isa: str) -> None:
    batch = ragged([(1, 40), (1, 9), (1, 70)], 16)
    q = rand(3, 2, 32, dtype=torch.float32)
    keys, values = (batch.cache(2, 32, dtype=torch.float32, seed=s) for s in (2, 3))
    clean = gqa(batch, q, keys, values, "cpu")
    q[1] = float("nan")
    spoilt = gqa(batch, q, keys, values, "cpu")
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


def test_wrong_arguments_are_named() -> None:
    batch = ragged([(2, 5)], 16)
    q = rand(2, 4, 32, dtype=torch.float32)
    keys = batch.cache(2, 32, dtype=torch.float32, seed=2)
    good = [q, keys, keys, *batch.tables(), 1.0]
    _cpu.attention_gqa(*good)
    for place, name, bad in [
        (0, "q", q[:, :3]),
        (0, "q", q.double()),
        (1, "key_cache", keys[..., :16]),
        (1, "key_cache", keys.transpose(2, 3).contiguous().transpose(2, 3)),
        (2, "value_cache", keys.bfloat16()),
        (3, "page_table", batch.page_table.long()),
        (4, "slots", batch.slots + 100),
        (4, "slots", batch.slots - 100),
        (5, "q_start", batch.q_start + 1),
        (5, "q_start", batch.q_start[:1]),
        (6, "kv_len", batch.kv_len - 4),
        (6, "kv_len", batch.kv_len + 1000),
    ]:
        arguments = list(good)
        arguments[place] = bad
        with pytest.raises(ValueError, match=name):
            _cpu.attention_gqa(*arguments)
    with pytest.raises(TypeError):
        _cpu.attention_gqa(None, *good[1:])


def test_no_queries_over_long_contexts(isa: str) -> None:
    table, none = torch.arange(8, dtype=torch.int32).view(1, 8), torch.tensor([0, 0]).int()
    cache, rows = torch.zeros(8, 64, 2, 16), (torch.tensor([0]).int(), none)
    run = _cpu.attention_gqa
    assert (
        run(torch.zeros(0, 4, 16), cache, cache, table, *rows, none[:1] + 300, 0.25).shape[0] == 0
    )


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-46, float("nan"), float("inf")])
def test_scales_that_order_no_scores(scale: float) -> None:
    batch, q = ragged([(1, 9)], 16), torch.zeros(1, 2, 32)
    cache = batch.cache(2, 32, dtype=torch.float32, seed=1)
    with pytest.raises(ValueError, match="attention_gqa: scale: must be positive"):
        _cpu.attention_gqa(q, cache, cache, *batch.tables(), scale)
