# SPDX-License-Identifier: MIT
"""`LogitEdits`: what one request's parameters do to its own row of logits before sampling.

In this order: allowed_token_ids, bad words, min_tokens, longer phrases, logit_bias. Knows one row,
no batch.
"""

from dataclasses import dataclass, field

import torch

from tokenspeed.execution.sampling_params import SamplingParams

NEVER = float("-inf")


@dataclass(slots=True)
class LogitEdits:
    """Built anew whenever a request is bound to a slot."""

    allowed: torch.Tensor | None  # [n] int64
    bias_ids: torch.Tensor | None  # [n] int64
    bias: torch.Tensor  # [n] float32
    stop_ids: torch.Tensor | None  # [n] int64
    min_position: int  # a stop id may stand at this position of the sequence or later
    banned: torch.Tensor | None  # [n] int64: the bad words of one token
    phrases: dict[int, list[list[int]]]  # the longer ones, by their last token but one
    outputs: list[int] = field(default_factory=list)  # kept only if there are phrases

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        prompt_len: int,
        stop_ids: list[int],
        output_ids: list[int],
        device: torch.device,
    ) -> "LogitEdits":
        """The edits of a request that has produced `output_ids` so far."""
        min_position = prompt_len + params.min_tokens
        bias = params.logit_bias or {}
        words = params.bad_words_token_ids or []
        phrases: dict[int, list[list[int]]] = {}
        for word in words:
            if len(word) > 1:
                phrases.setdefault(word[-2], []).append(word)
        return cls(
            allowed=_ids(params.allowed_token_ids or [], device),
            bias_ids=_ids(list(bias), device),
            bias=torch.tensor(list(bias.values()), dtype=torch.float32, device=device),
            stop_ids=_ids(stop_ids if params.min_tokens else [], device),
            min_position=min_position,
            banned=_ids([word[0] for word in words if len(word) == 1], device),
            phrases=phrases,
            outputs=list(output_ids) if phrases else [],
        )

    def apply(self, row: torch.Tensor, position: int) -> None:
        """In place on `row` [vocab_size], the logits of the token at `position`."""
        if self.allowed is not None:
            kept = row[self.allowed]
            row.fill_(NEVER)
            row[self.allowed] = kept
        if self.banned is not None:
            row[self.banned] = NEVER
        if self.stop_ids is not None and position < self.min_position:
            row[self.stop_ids] = NEVER
        for word in self.phrases.get(self.outputs[-1], ()) if self.outputs else ():
            if self.outputs[1 - len(word) :] == word[:-1]:
                _ban_unless_last(row, word[-1])
        if self.bias_ids is not None:
            row[self.bias_ids] += self.bias

    def record(self, token_id: int) -> None:
        """Takes note of the id that was sampled; -1 is none."""
        if self.phrases and token_id >= 0:
            self.outputs.append(token_id)


def _ban_unless_last(row: torch.Tensor, token_id: int) -> None:
    """A phrase may end where nothing else is left to choose: admission cannot foresee that."""
    kept = row[token_id].clone()
    row[token_id] = NEVER
    if bool(torch.isneginf(row).all()):
        row[token_id] = kept


def _ids(ids: list[int], device: torch.device) -> torch.Tensor | None:
    return torch.tensor(ids, dtype=torch.int64, device=device) if ids else None
