# SPDX-License-Identifier: MIT
"""Qwen3 mixture of experts: Qwen3's attention, softmax routing, dense layers where configured."""

from tokenspeed.layers.layer import Layer
from tokenspeed.layers.moe import MAX_EXPERTS, MoE, Routing
from tokenspeed.models.decoder_model import Build
from tokenspeed.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """Experts in the layers that `mlp_only_layers` and `decoder_sparse_step` leave."""

    default_head_dim = None  # hidden_size / num_attention_heads

    @classmethod
    def feed_forward(cls, build: Build, index: int) -> Layer:
        """Experts in every `decoder_sparse_step`-th layer that is not among `mlp_only_layers`."""
        config = build.config
        sparse = (index + 1) % config.integer("decoder_sparse_step", 1) == 0
        if not sparse or index in config.integers("mlp_only_layers"):
            return super().feed_forward(build, index)
        key = "num_experts" if config.has("num_experts") else "num_local_experts"
        routing = Routing(
            num_experts=config.integer(key, maximum=MAX_EXPERTS),
            top_k=config.integer("num_experts_per_tok"),
            norm=config.boolean("norm_topk_prob", False),
        )
        if routing.top_k > routing.num_experts:
            raise config.error("num_experts_per_tok", f"more than {routing.num_experts} experts")
        inner = config.integer("moe_intermediate_size")
        return MoE(build.target, build.decoder.hidden_size, routing, inner)
