# SPDX-License-Identifier: MIT
"""`ForwardBatch`: the tensors of one step that every layer reads. Knows shapes, no requests."""

from dataclasses import dataclass
from functools import cached_property

import torch

LONG_ROW = 160  # tokens from which keys of every head are cheaper made than avoided
MAX_MADE_KEYS = 2048  # made at once: what bounds their memory


@dataclass(frozen=True)
class ForwardBatch:
    """One ragged batch: rows of consecutive tokens, each row a piece of one slot's sequence.

        tokens:   | row 0 (decode) | row 1 (prefill chunk)     | row 2 ...
        q_start:  0                1                           65 ...

    Row r computes positions [kv_len[r] - q_len[r], kv_len[r]) of its sequence; its keys and values
    stand in pages page_table[slots[r], 0 : ceil(kv_len[r] / page_size)].
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int32
    cache_index: torch.Tensor  # [T] int64: page * page_size + offset where the token's KV goes
    q_start: torch.Tensor  # [R + 1] int32
    kv_len: torch.Tensor  # [R] int32, this step's tokens included
    slots: torch.Tensor  # [R] int32
    page_table: torch.Tensor  # [max_num_seqs, max_pages_per_seq] int32, persistent
    logits_index: torch.Tensor  # [L] int64: tokens whose logits are wanted
    max_q_len: int  # no row has more tokens in this step
    max_kv_len: int  # no kv_len is larger

    @cached_property
    def row_kinds(self) -> "tuple[RowSet, LongRows | None]":
        """Rows shorter than LONG_ROW, perhaps none, and the others. Looks at lengths on the device
        only in steps that have a long row."""
        whole = RowSet(None, self.slots, self.q_start, self.kv_len)
        if self.max_q_len < LONG_ROW:
            return whole, None
        lengths = self.q_start.diff()
        is_long = lengths >= LONG_ROW
        if not bool(is_long.any()):
            return whole, None
        if bool(is_long.all()):
            return self._rows(lengths, ~is_long), LongRows.of(whole)
        return self._rows(lengths, ~is_long), LongRows.of(self._rows(lengths, is_long))

    def _rows(self, lengths: torch.Tensor, chosen: torch.Tensor) -> "RowSet":
        tokens = chosen.repeat_interleave(lengths).nonzero()[:, 0]
        ends = lengths[chosen].cumsum(0, dtype=torch.int32)
        q_start = torch.cat([ends.new_zeros(1), ends])
        return RowSet(tokens, self.slots[chosen], q_start, self.kv_len[chosen])


@dataclass(frozen=True)
class RowSet:
    """Some rows of a batch as a ragged batch of their own."""

    tokens: torch.Tensor | None  # [t] int64 places in the whole batch; None: all of it
    slots: torch.Tensor  # [r] int32
    q_start: torch.Tensor  # [r + 1] int32
    kv_len: torch.Tensor  # [r] int32


@dataclass(frozen=True)
class KeyPiece:
    """Consecutive keys of every row, put in line: positions from `first` on."""

    first: torch.Tensor  # [r] int32
    starts: torch.Tensor  # [r + 1] int32 of the keys in line
    num_keys: int
    causal: bool  # the last query sees the last key; else every query sees all


@dataclass(frozen=True)
class LongRows:
    """Rows whose keys are made for every head, a piece at a time.

    pieces: those of the step's own tokens, which are causal, then what stood in the cache before.
    """

    rows: RowSet
    pieces: tuple[KeyPiece, ...]

    @classmethod
    def of(cls, rows: RowSet) -> "LongRows":
        history = rows.kv_len - rows.q_start.diff()
        pieces = [KeyPiece(history, rows.q_start, int(rows.q_start[-1]), True)]
        step = max(1, MAX_MADE_KEYS // len(history))
        for begin in range(0, int(history.max()), step):
            first = history.clamp(max=begin)
            ends = (history.clamp(max=begin + step) - first).cumsum(0, dtype=torch.int32)
            starts = torch.cat([ends.new_zeros(1), ends])
            pieces.append(KeyPiece(first, starts, int(starts[-1]), False))
        return cls(rows, tuple(pieces))
