# SPDX-License-Identifier: MIT
"""Token ids to hidden states, and hidden states to logits."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.spmd.placement import REPLICATED, ModuleSpec, Partial, Shard


class Embedding(Layer):
    """ids [T] int64 -> [T, hidden]. Over ranks the vocabulary is divided and the result summed."""

    def __init__(self, target: Target, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.spec = ModuleSpec(REPLICATED, {"tp": Partial()}, {"weight": {"tp": Shard(0)}})
        self.weight = self.own_parameter((vocab_size, hidden_size), target.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def sources(self) -> Iterator[Source]:
        yield self.source("embed_tokens.weight", "weight")


class LMHead(Layer):
    """hidden [L, hidden] -> logits [L, vocab] float32. Tied, it uses the embedding's weight."""

    def __init__(self, target: Target, embedding: Embedding, *, tied: bool) -> None:
        super().__init__()
        self.spec = ModuleSpec(REPLICATED, {"tp": Shard(1)}, {"weight": {"tp": Shard(0)}})
        vocab_size, hidden_size = embedding.weight.shape
        self.embedding = (embedding,)  # in a tuple: a reference, not a child
        self.tied = tied
        if not tied:
            self.weight = self.own_parameter((vocab_size, hidden_size), target.dtype)
        self.kernel = target.kernel("linear", num_inputs=hidden_size, num_outputs=vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.embedding[0].weight if self.tied else self.weight
        logits: Tensor = self.kernel(hidden, weight, None)
        return logits.float()

    def sources(self) -> Iterator[Source]:
        if not self.tied:
            yield self.source("lm_head.weight", "weight")
