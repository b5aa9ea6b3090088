# SPDX-License-Identifier: MIT
"""Latent attention in two forms: with long rows materialised, models equal transformers too."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.unit.test_models_parity import check_family
from tokenspeed.layers import batch as batches
from tokenspeed.layers.batch import ForwardBatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(("long_row", "keys"), [(1, 2048), (2, 33), (25, 16)])
def test_long_rows_in_pieces_equal_transformers(
    family: str, long_row: int, keys: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows long; prefills long and decodes short; only the longest rows long."""
    monkeypatch.setattr(batches, "LONG_ROW", long_row)
    monkeypatch.setattr(batches, "MAX_MADE_KEYS", keys)
    check_family(make_checkpoint(tmp_path, family))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch_of(lengths: list[int], kv_len: list[int]) -> ForwardBatch:
    none = torch.zeros(0, dtype=torch.int64)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    slots, table = torch.arange(len(lengths)).int(), torch.zeros(1, 1, dtype=torch.int32)
    return ForwardBatch(
        none, none.int(), none, starts, ints(*kv_len), slots, table, none, max(lengths), max(kv_len)
    )


def test_rows_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LONG_ROW", 3)
    monkeypatch.setattr(batches, "MAX_MADE_KEYS", 20)
    short, long = batch_of([1, 4, 2, 3], [9, 16, 2, 3]).row_kinds
    assert long is not None
    assert short.tokens is not None
    assert long.rows.tokens is not None
    assert short.tokens.tolist() == [0, 5, 6]
    assert short.q_start.tolist() == [0, 1, 3]
    assert short.kv_len.tolist() == [9, 2]
    assert long.rows.tokens.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert long.rows.slots.tolist() == [1, 3]
    own, *history = long.pieces
    assert own.causal
    assert own.first.tolist() == [12, 0]
    assert own.starts.tolist() == [0, 4, 7]
    assert [piece.first.tolist() for piece in history] == [[0, 0], [10, 0]]
    assert [piece.starts.tolist() for piece in history] == [[0, 10, 10], [0, 2, 2]]
    assert not any(piece.causal for piece in history)


def test_without_long_rows_nothing_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([1, 4], [9, 16])
    short, long = batch.row_kinds
    assert long is None
    assert short.tokens is None
    assert short.q_start is batch.q_start
    monkeypatch.setattr(batches, "LONG_ROW", 1)
    short, long = batch_of([1, 4], [9, 16]).row_kinds
    assert long is not None
    assert long.rows.tokens is None
    assert len(short.slots) == 0
