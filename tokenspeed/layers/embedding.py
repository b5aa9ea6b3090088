# SPDX-License-Identifier: MIT
"""Token ids to hidden states, and hidden states to logits."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.spmd.placement import ModuleSpec, Partial, Shard, tokens


class Embedding(Layer):
    """ids [T] int64 -> [T, hidden]. Over ranks the vocabulary is divided and the result summed."""

    weight: nn.Parameter

    def __init__(self, target: Target, vocab_size: int, hidden_size: int) -> None:
        super().__init__(target)
        rows = {"weight": {"tp": Shard(0)}}
        self.spec = ModuleSpec("embedding", tokens(), tokens(tp=Partial()), rows)
        self.own_parameter("weight", (vocab_size, hidden_size))

    def choose_kernels(self) -> None:
        (vocab,) = self.cuts["weight"].dims[0]
        self.first = vocab.start
        self.kernel = self.target.kernel("embedding", size=self.weight.shape[1])

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.kernel(ids, self.weight, self.first)
        return y

    def sources(self) -> Iterator[Source]:
        yield self.source("embed_tokens.weight", "weight")


class LMHead(Layer):
    """hidden [L, hidden] -> logits [L, vocab] float32 or wider; tied, by the embedding's weight."""

    weight: nn.Parameter

    def __init__(self, target: Target, embedding: Embedding, *, tied: bool) -> None:
        super().__init__(target)
        rows = embedding.spec.weights if tied else {"weight": {"tp": Shard(0)}}
        self.spec = ModuleSpec("linear", tokens(), tokens(tp=Shard(1)), rows)
        self.embedding = (embedding,)  # in a tuple: a reference, not a child
        self.tied = tied
        if not tied:
            self.own_parameter("weight", embedding.cuts["weight"].global_shape)

    @property
    def borrowed(self) -> Mapping[str, nn.Parameter]:
        return {"weight": self.embedding[0].weight} if self.tied else {}

    def choose_kernels(self) -> None:
        outputs, inputs = (self.embedding[0] if self.tied else self).weight.shape
        sizes = {"num_inputs": inputs, "num_outputs": outputs}
        self.kernel = self.target.weight_kernel("linear", **sizes)

    def pack_weights(self) -> None:
        """A tied weight that is not quantised is held once, as the embedding reads it."""
        if not self.tied:
            self.packed = self.target.pack(self.kernel, self.weight)
            if self.packed is not self.weight:
                self.give_up("weight")
        elif self.target.quantization is None:
            self.packed = self.embedding[0].weight
        else:
            self.packed = self.target.pack(self.kernel, self.embedding[0].weight)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.kernel(hidden, self.packed, None, True)
        return logits

    def sources(self) -> Iterator[Source]:
        if not self.tied:
            yield self.source("lm_head.weight", "weight")
