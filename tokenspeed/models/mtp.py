# SPDX-License-Identifier: MIT
"""`MtpModule`: a layer behind the last one that predicts the token after the next.

    token i + 1 -> embed_tokens -> enorm \\
                                           eh_proj -> decoder layer -> norm -> the model's own head
    the model's hidden state of i -> hnorm /

arXiv:2412.19437, section 2.2. The hidden state is the model's after its last norm, and what comes
out is one such again, of i + 1: with a drafted token beside it the module goes on by itself. Knows
no slots, and not who drafts or why.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.embedding import Embedding
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.linear import PairLinear
from tokenspeed.layers.norm import ResidualNorm, RMSNorm
from tokenspeed.models.decoder_config import DecoderConfig
from tokenspeed.models.decoder_layer import Attention, DecoderLayer

# What each module's checkpoint repeats of the model's own.
SHARED = ("embed_tokens.weight", "shared_head.head.weight")


class SharedEmbedding(Layer):
    """ids [T] -> [T, hidden], by the weight of the model's embedding."""

    def __init__(self, target: Target, embedding: Embedding) -> None:
        super().__init__(target)
        self.spec = embedding.spec
        self.embedding = (embedding,)  # in a tuple: a reference, not a child

    @property
    def borrowed(self) -> Mapping[str, nn.Parameter]:
        return {"weight": self.embedding[0].weight}

    def forward(self, ids: Tensor) -> Tensor:
        model = self.embedding[0]
        y: Tensor = model.kernel(ids, model.weight, model.first)
        return y


class MtpModule(Layer):
    """One module. Its pieces have the checkpoint's names once `checkpoint_name` took away `block`.

    `block` is a decoder layer of the model's own kind.
    """

    def __init__(
        self, target: Target, config: DecoderConfig, embedding: Embedding, block: DecoderLayer
    ) -> None:
        super().__init__(target)
        size, eps = config.hidden_size, config.norm_eps
        self.embed_tokens = SharedEmbedding(target, embedding)
        self.enorm = RMSNorm(target, "enorm", size, eps)
        self.hnorm = RMSNorm(target, "hnorm", size, eps)
        self.eh_proj = PairLinear(target, 2 * size, {"eh_proj": size})
        self.block = block
        self.norm = ResidualNorm(target, "shared_head.norm", size, eps)
        joint = ("eh_proj", "block", "norm")
        self.flows = (("embed_tokens", "enorm", *joint), ("hnorm", *joint))

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        """What its layer keeps per token of this rank."""
        return cast(Attention, self.block.self_attn).cache_spec(dtype)

    def forward(self, hidden: Tensor, batch: ForwardBatch, cache: tuple[Tensor, ...]) -> Tensor:
        """hidden [T, D] beside `batch.token_ids`, each the token behind its hidden state: [T, D].

        The rest of the batch says where the hidden states stand; keys and values go there.
        """
        embedded = self.enorm(self.embed_tokens(batch.token_ids))
        x = self.eh_proj(embedded, self.hnorm(hidden))
        normed: Tensor = self.norm.add(*self.block(x, None, batch, cache))[0]
        return normed
