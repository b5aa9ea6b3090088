# SPDX-License-Identifier: MIT
"""A plan's words become the right tensors, and results the right words."""

from typing import Any

import numpy as np
import pytest
import torch

from tokenspeed.config import CacheOptions
from tokenspeed.execution import plan_view as pv
from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.kv_cache import KVCache, choose_num_pages, fit_max_model_len
from tokenspeed.layers.cache_spec import CacheSpec

CPU = torch.device("cpu")


def plan(
    rows: list[tuple[int, ...]],
    tokens: list[int],
    deltas: list[tuple[int, int, int, int]] | None = None,
    binds: list[tuple[int, int, int, int]] | None = None,
) -> pv.Words:
    """Rows are (slot, flags, start, num_tokens), and num_draft, num_propose where not 0."""
    offset, full_rows = 0, []
    for slot, flags, start, count, *speculated in rows:
        num_draft, num_propose = speculated or (0, 0)
        full_rows.append((slot, flags, start, count, num_draft, offset, num_propose))
        offset += count
    sections: list[Any] = [full_rows, tokens, deltas or [], [], binds or []]
    body = np.concatenate([np.array(s, np.int32).ravel() for s in sections])
    header = np.zeros(pv.HEADER_WORDS, np.int32)
    header[:5] = pv.PLAN_MAGIC, pv.LAYOUT_VERSION, pv.HEADER_WORDS + body.size, 9, 1
    header[5:10] = [len(s) for s in sections]
    header[10] = all(row[1] == pv.ROW_SAMPLE and row[3] == 1 and not row[6] for row in full_rows)
    return np.concatenate([header, body]).astype(np.int32)


def batcher(page_size: int = 4) -> Batcher:
    return Batcher(max_num_seqs=4, max_model_len=18, page_size=page_size, device=CPU)


def test_a_mixed_batch() -> None:
    made = batcher()
    made.last_ids[2] = 77
    words = plan(
        rows=[(2, pv.ROW_SAMPLE, 5, 1), (0, pv.ROW_PREFILL, 3, 6), (1, pv.ROW_SAMPLE, 0, 2)],
        tokens=[pv.TOKEN_FROM_DEVICE, 10, 11, 12, 13, 14, 15, 20, 21],
        deltas=[(0, 2, 1, 30), (0, 0, 0, 7), (0, 0, 1, 8), (0, 0, 2, 9), (0, 1, 0, 1)],
    )
    view = pv.PlanView(words)
    made.apply_deltas(view.deltas)
    batch = made.build(view).forward
    assert batch.token_ids.tolist() == [77, 10, 11, 12, 13, 14, 15, 20, 21]
    assert batch.positions.tolist() == [5, 3, 4, 5, 6, 7, 8, 0, 1]
    assert batch.cache_index.tolist() == [121, 31, 32, 33, 34, 35, 36, 4, 5]
    assert batch.q_start.tolist() == [0, 1, 7, 9]
    assert batch.kv_len.tolist() == [6, 9, 2]
    assert batch.slots.tolist() == [2, 0, 1]
    assert batch.logits_index.tolist() == [0, 8]
    assert (batch.max_q_len, batch.max_kv_len) == (6, 9)
    assert batch.page_table.shape == (4, 5)
    kinds = (batch.token_ids, batch.cache_index, batch.logits_index)
    assert {t.dtype for t in kinds} == {torch.int64}
    small = (batch.positions, batch.q_start, batch.kv_len, batch.slots, batch.page_table)
    assert {t.dtype for t in small} == {torch.int32}


def test_the_page_table_keeps_what_no_delta_names() -> None:
    made = batcher()
    made.apply_deltas(pv.PlanView(plan([], [], [(0, 3, 0, 5), (0, 3, 1, 6)])).deltas)
    table = made.build(pv.PlanView(plan([(3, 0, 0, 1)], [1]))).forward.page_table
    made.apply_deltas(pv.PlanView(plan([], [], [(0, 3, 1, 2)])).deltas)
    assert table[3].tolist() == [5, 2, 0, 0, 0]


def test_results_are_ragged_and_name_failed_rows() -> None:
    view = pv.PlanView(plan([(2, 1, 0, 1), (0, 0, 0, 1), (1, 1, 0, 1)], [1, 2, 3]))
    result = view.result(np.array([50]), np.array([1, 0, 0]), np.array([False, False, True]))
    header, rows, ids = result[:8], result[8:17].reshape(3, 3), result[17:]
    assert header.tolist() == [pv.RESULT_MAGIC, pv.LAYOUT_VERSION, len(result), 9, 1, 3, 1, 0]
    assert rows.tolist() == [[2, 0, 1], [0, 0, 0], [1, pv.ROW_FAILED, 0]]
    assert ids.tolist() == [50]
    assert result.dtype == np.int32


def test_rows_with_drafts_accept_several_ids() -> None:
    view = pv.PlanView(plan([(2, 1, 4, 3, 2, 5), (0, 1, 0, 1)], [1, 2, 3, 4]))
    assert (view.num_draft.tolist(), view.num_propose.tolist()) == ([2, 0], [5, 0])
    result = view.result(np.array([2, 7, 50]), np.array([2, 1]), np.array([False, False]))
    assert result[8:].tolist() == [2, pv.ROW_OK, 2, 0, pv.ROW_OK, 1, 2, 7, 50]


def test_request_ids_are_64_bits_wide() -> None:
    wide = 2**63 + 5
    bind = (1, 5, -(2**31), 3)  # low half, high half as signed words
    assert pv.PlanView(plan([], [], binds=[bind])).bound_request_ids() == [wide]


@pytest.mark.parametrize("change", [(0, 1), (1, 1), (2, 99), (5, 3), (6, 0)])
def test_words_that_are_no_plan_are_refused(change: tuple[int, int]) -> None:
    words = plan([(0, 1, 0, 2)], [4, 5])
    words[change[0]] = change[1]
    with pytest.raises(ValueError, match="plan"):
        pv.PlanView(words)
    with pytest.raises(ValueError, match="plan"):
        pv.PlanView(words[:10])


SPECS = [CacheSpec(((2, 8), (2, 8)), torch.float32)] * 3  # 384 bytes a token


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_pages": 5}, 5),
        ({"kv_cache_memory_bytes": 384 * 16 * 7 + 1}, 7),
        ({}, 2 * 4 * 7),  # two lives for each of 4 slots of 100 tokens
    ],
)
def test_how_many_pages(options: dict[str, int], expected: int) -> None:
    chosen = choose_num_pages(
        CacheOptions(page_size=16, **options),
        SPECS,
        max_model_len=100,
        max_num_seqs=4,
    )
    assert chosen == expected


@pytest.mark.parametrize("option", ["num_pages", "kv_cache_memory_bytes"])
def test_more_than_there_is_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match="are free"):
        choose_num_pages(CacheOptions(**{option: 2**50}), SPECS, max_model_len=100, max_num_seqs=4)


def test_the_context_length_follows_the_cache() -> None:
    assert fit_max_model_len(None, 4096, 10, 16) == 160
    assert fit_max_model_len(None, 100, 10, 16) == 100
    assert fit_max_model_len(160, 160, 10, 16) == 160
    with pytest.raises(ValueError, match="holds 160 tokens"):
        fit_max_model_len(161, 161, 10, 16)
    with pytest.raises(ValueError, match="holds 0 tokens"):
        fit_max_model_len(None, 4096, 0, 16)


def test_pages_are_copied_in_every_layer() -> None:
    cache = KVCache(SPECS, num_pages=4, page_size=2, device=CPU)
    for tensors in cache.layers:
        for tensor in tensors:
            tensor.copy_(torch.arange(4.0)[:, None, None, None].expand_as(tensor))
    cache.copy_pages(torch.tensor([3, 1]), torch.tensor([0, 2]))
    for tensors in cache.layers:
        for tensor in tensors:
            assert tensor[:, 1, 1, 7].tolist() == [3, 1, 1, 3]
