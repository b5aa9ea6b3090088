# SPDX-License-Identifier: MIT
"""An EAGLE-3 head: one decoder layer over a token's embedding and the target's hidden states.

    fused  = fc(low, middle, high)                          of position p, from the target
    hidden = hidden + attention(norm(embedding of token p + 1) | norm(hidden))
    hidden = hidden + feed-forward(norm(hidden))          stands in for `fused` of position p + 1
    logits = lm_head(norm(hidden))                        of token p + 2, over few tokens or all

Attention input is twice as wide as hidden states. Knows no requests, and of its target nothing but
sizes. Source: arXiv:2503.01840; names and layout as in the published checkpoints.
"""

import torch
from torch import Tensor

from tokenspeed.layers.attention_gqa import GqaAttention, GqaShape
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.embedding import Embedding, LMHead
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.linear import Linear
from tokenspeed.layers.mlp import MLP
from tokenspeed.layers.norm import ResidualNorm, RMSNorm
from tokenspeed.layers.rope import rope_table
from tokenspeed.models.eagle3_config import Eagle3Config
from tokenspeed.spmd.localise import Spmd
from tokenspeed.spmd.placement import Inline

OF_LAYER = ("hidden_norm", "input_layernorm", "mlp", "post_attention_layernorm", "self_attn")


class Eagle3Body(Layer):
    """Token ids [T] and hidden states [T, hidden] to the same one position on."""

    _from_norms = (
        Inline("side_by_side", "elementwise"),
        "self_attn",
        "post_attention_layernorm",
        "mlp",
        "norm",
    )
    flows = (
        ("embed_tokens", "input_layernorm", *_from_norms),
        ("hidden_norm", *_from_norms),
        ("fc",),
    )

    def __init__(self, target: Target, config: Eagle3Config) -> None:
        super().__init__(target)
        decoder, bias = config.decoder, config.attention_bias
        size, eps = decoder.hidden_size, decoder.norm_eps
        self.norm_before_residual = config.norm_before_residual
        num_heard = len(config.aux_layers)
        self.fc = Linear(target, num_heard * config.target_hidden_size, {"fc": size})
        self.embed_tokens = Embedding(target, decoder.vocab_size, size)
        self.input_layernorm = RMSNorm(target, "input_layernorm", size, eps)
        self.hidden_norm = RMSNorm(target, "hidden_norm", size, eps)
        shape = GqaShape(size, *config.heads, qkv_bias=bias, o_bias=bias, paired=True)
        cos_sin = rope_table(decoder.rope, decoder.max_position, target.device)
        self.self_attn = GqaAttention(target, shape, cos_sin)
        self.post_attention_layernorm = ResidualNorm(target, "post_attention_layernorm", size, eps)
        self.mlp = MLP(target, size, config.intermediate_size, bias=config.mlp_bias)
        self.norm = ResidualNorm(target, "norm", size, eps)

    def forward(
        self, ids: Tensor, hidden: Tensor, batch: ForwardBatch, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """[T, hidden], not normalised."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        embedded = self.input_layernorm(self.embed_tokens(ids))
        out = self.self_attn((embedded, normed), batch, cache)
        out, residual = self.post_attention_layernorm.add(out, residual)
        return self.norm.add(self.mlp(out), residual)[1]


class Eagle3(Layer):
    """The whole head. On the meta device until loaded (`models/eagle3_build.py`).

    `draft_ids` [draft_vocab_size] int64 are the target's ids of the draft vocabulary; None: the
    same ids.
    """

    flows = (("body", "lm_head"),)
    spmd: Spmd
    draft_ids: Tensor | None = None

    def __init__(self, target: Target, config: Eagle3Config) -> None:
        super().__init__(target)
        self.config = config
        self.body = Eagle3Body(target, config)
        rows = Embedding(target, config.draft_vocab_size, config.decoder.hidden_size)
        self.lm_head = LMHead(target, rows, tied=False)

    def fuse(self, aux_hidden: list[Tensor]) -> Tensor:
        """The target's residual streams, each [T, target hidden] -> [T, hidden]."""
        fused: Tensor = self.body.fc(torch.cat(aux_hidden, 1))
        return fused

    def forward(
        self, ids: Tensor, hidden: Tensor, batch: ForwardBatch, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """[T, hidden] of each token with the hidden state of the position before it.

        Before it, `spmd.begin_step` says how many tokens there are.
        """
        left: Tensor = self.body(ids, hidden, batch, cache)
        return left

    def logits(self, left: Tensor) -> Tensor:
        """What `forward` left, [L, hidden] -> float32 [L, vocab_size of the target].

        -inf where no draft can be.
        """
        drafts: Tensor = self.lm_head(self.body.norm(left))
        if self.draft_ids is None:
            return drafts
        logits = drafts.new_full((len(drafts), self.config.decoder.vocab_size), float("-inf"))
        return logits.index_copy_(1, self.draft_ids, drafts)

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        """What its one layer keeps of a token on this rank."""
        return self.body.self_attn.cache_spec(dtype)

    def share_embedding(self, whole: Embedding) -> None:
        """Reads the target's rows in place of own ones, which no checkpoint then fills."""
        mine = self.body.embed_tokens
        del self.body.embed_tokens
        mine.register_parameter("weight", whole.weight)
        mine.settle()
        self.body.__dict__["embed_tokens"] = mine

    def checkpoint_name(self, name: str) -> str:
        """The body's modules stand at the root, those of its layer in `midlayer`."""
        inner = name.removeprefix("body.")
        return f"midlayer.{inner}" if inner.startswith(OF_LAYER) else inner

    def sets_aside(self, name: str) -> bool:
        """The tables between the vocabularies, which are read apart."""
        return name in ("d2t", "t2d") or name.endswith(".rotary_emb.inv_freq")
