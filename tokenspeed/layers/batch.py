# SPDX-License-Identifier: MIT
"""`ForwardBatch`: the tensors of one step that every layer reads. Knows shapes, no requests."""

from dataclasses import dataclass

import torch


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
