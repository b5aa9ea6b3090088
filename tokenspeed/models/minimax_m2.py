# SPDX-License-Identifier: MIT
"""MiniMax M2 and M2.1: a norm over all heads at once, half of each head turned, sigmoid routing.

Every layer has experts and none of them is shared. The layers after the last one predict several
tokens ahead (MTP, `models/mtp.py`). Source: the release's model card
and configuration, https://huggingface.co/MiniMaxAI/MiniMax-M2.
"""

from typing import ClassVar

from tokenspeed.layers.attention_gqa import GqaAttention, GqaShape
from tokenspeed.layers.layer import Layer
from tokenspeed.layers.moe import MAX_EXPERTS, MoE, Routing
from tokenspeed.models.decoder_config import read_heads, read_rotary_factor
from tokenspeed.models.decoder_model import Build, DecoderModel
from tokenspeed.models.hf_config import HfConfig

SPELLING = {
    ".mlp.gate.e_score": ".mlp.e_score",
    ".gate_proj.": ".w1.",
    ".down_proj.": ".w2.",
    ".up_proj.": ".w3.",
    ".mlp.": ".block_sparse_moe.",
}


class MiniMaxM2ForCausalLM(DecoderModel):
    """Every layer the same: grouped-query attention and experts."""

    default_head_dim: ClassVar[int | None] = 128

    @classmethod
    def rope_dim(cls, config: HfConfig) -> int:
        """`rotary_dim` in the release; a part of `head_dim` in newer files."""
        head_dim = super().rope_dim(config)
        part = int(head_dim * read_rotary_factor(config))
        return config.integer("rotary_dim", part, maximum=head_dim)

    @classmethod
    def read_mtp_layers(cls, config: HfConfig) -> int:
        modules = config.integer("num_mtp_modules", 0, minimum=0)
        return modules * config.integer("mtp_transformer_layers", 1, minimum=0)

    @classmethod
    def attention(cls, build: Build) -> GqaAttention:
        config = build.config
        config.word("qk_norm_type", ("per_layer",), "per_layer")
        if not config.boolean("use_qk_norm", True):
            raise config.error("use_qk_norm", "only true is supported")
        if set(config.integers("attn_type_list")) - {1}:
            raise config.error("attn_type_list", "only full attention, 1, is supported")
        shape = GqaShape(
            build.decoder.hidden_size,
            *read_heads(config, default_head_dim=cls.default_head_dim),
            qk_norm="token",
            norm_eps=build.decoder.norm_eps,
        )
        return GqaAttention(build.target, shape, build.cos_sin)

    @classmethod
    def feed_forward(cls, build: Build, index: int) -> Layer:
        config = build.config
        config.word("scoring_func", ("sigmoid",), "sigmoid")
        if not config.boolean("use_routing_bias", True):
            raise config.error("use_routing_bias", "only true is supported")
        if config.integer("shared_intermediate_size", 0, minimum=0):
            raise config.error("shared_intermediate_size", "shared experts are not supported")
        routing = Routing(
            num_experts=config.integer("num_local_experts", maximum=MAX_EXPERTS),
            top_k=config.integer("num_experts_per_tok"),
            scoring="sigmoid",
            correction_bias=True,
        )
        if routing.top_k > routing.num_experts:
            raise config.error("num_experts_per_tok", f"more than {routing.num_experts} experts")
        inner = config.integer("intermediate_size")
        return MoE(build.target, build.decoder.hidden_size, routing, inner)

    def checkpoint_name(self, name: str) -> str:
        name = super().checkpoint_name(name)
        for own, theirs in SPELLING.items():
            name = name.replace(own, theirs)
        return name
