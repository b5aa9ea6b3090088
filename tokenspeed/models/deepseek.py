# SPDX-License-Identifier: MIT
"""DeepSeek V2 and V3, and models of their shape such as the text part of Kimi K2.

Multi-head latent attention, mixture of experts with shared experts. The layers after the last
decoder layer predict several tokens ahead (MTP, `models/mtp.py`).
Sources: arXiv:2405.04434 (V2), arXiv:2412.19437 (V3).
"""

from typing import ClassVar, Literal

from tokenspeed.layers.attention_mla import MlaAttention, MlaShape
from tokenspeed.layers.layer import Layer
from tokenspeed.layers.moe import MAX_EXPERTS, MoE, Routing
from tokenspeed.layers.rope import RopeConfig
from tokenspeed.models.decoder_model import Build, DecoderModel
from tokenspeed.models.hf_config import HfConfig


class DeepseekV3ForCausalLM(DecoderModel):
    """DeepSeek V3 and R1, Kimi K2: sigmoid routing with a bias, in groups."""

    default_method: ClassVar[str] = "noaux_tc"

    @classmethod
    def rope_dim(cls, config: HfConfig) -> int:
        return config.integer("qk_rope_head_dim")

    @classmethod
    def read_mtp_layers(cls, config: HfConfig) -> int:
        return config.integer("num_nextn_predict_layers", 0, minimum=0)

    @classmethod
    def attention(cls, build: Build) -> MlaAttention:
        shape = _read_attention(build.config, build.decoder.rope)
        return MlaAttention(build.target, shape, build.cos_sin)

    @classmethod
    def feed_forward(cls, build: Build, index: int) -> Layer:
        """Experts from layer `first_k_dense_replace` on, in every `moe_layer_freq`-th layer."""
        config = build.config
        dense = not config.has("n_routed_experts")
        dense = dense or index < config.integer("first_k_dense_replace", minimum=0)
        if dense or index % config.integer("moe_layer_freq", 1):
            return super().feed_forward(build, index)
        inner = config.integer("moe_intermediate_size")
        shared = inner * config.integer("n_shared_experts", 0, minimum=0)
        return MoE(build.target, build.decoder.hidden_size, cls.routing(config), inner, shared)

    @classmethod
    def routing(cls, config: HfConfig) -> Routing:
        methods = ("greedy", "group_limited_greedy", "noaux_tc")
        method = config.word("topk_method", methods, cls.default_method)
        scoring: Literal["softmax", "sigmoid"] = "softmax"
        default = "sigmoid" if method == "noaux_tc" else "softmax"
        if config.word("scoring_func", ("softmax", "sigmoid"), default) == "sigmoid":
            scoring = "sigmoid"
        grouped = method != "greedy"
        routing = Routing(
            num_experts=config.integer("n_routed_experts", maximum=MAX_EXPERTS),
            top_k=config.integer("num_experts_per_tok"),
            scoring=scoring,
            n_group=config.integer("n_group", 1) if grouped else 1,
            topk_group=config.integer("topk_group", 1) if grouped else 1,
            group_score="top2" if method == "noaux_tc" else "max",
            norm=config.boolean("norm_topk_prob", method == "noaux_tc"),
            scale=config.number("routed_scaling_factor", 1.0),
            correction_bias=method == "noaux_tc",
        )
        _check_routing(config, routing)
        return routing


class DeepseekV2ForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek V2: softmax routing, greedy or in groups."""

    default_method = "greedy"


def _check_routing(config: HfConfig, routing: Routing) -> None:
    experts, groups = routing.num_experts, routing.n_group
    if experts % groups:
        raise config.error("n_group", f"{groups} does not divide {experts} experts")
    if routing.topk_group > groups:
        raise config.error("topk_group", f"more than n_group {groups}")
    if routing.group_score == "top2" and groups > 1 and experts // groups < 2:
        raise config.error("n_group", "groups need at least 2 experts")
    if routing.top_k > experts // groups * routing.topk_group:
        raise config.error("num_experts_per_tok", "more than the experts of the chosen groups")
    if routing.scoring == "softmax" and routing.norm and routing.scale != 1.0:
        # The release scales only weights that it does not normalise; others do both.
        raise config.error("norm_topk_prob", "true with softmax needs routed_scaling_factor 1")


def _read_attention(config: HfConfig, rope: RopeConfig) -> MlaShape:
    nope, rope_dim = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    heads = config.integer("num_attention_heads")
    if config.integer("num_key_value_heads", heads) != heads:
        raise config.error("num_key_value_heads", f"must be num_attention_heads, {heads}")
    return MlaShape(
        hidden_size=config.integer("hidden_size"),
        num_heads=heads,
        q_lora_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
        kv_lora_rank=config.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope_dim,
        value_dim=config.integer("v_head_dim"),
        softmax_scale=(nope + rope_dim) ** -0.5 * rope.softmax_scale(),
        interleaved=config.boolean("rope_interleave", True),
        bias=config.boolean("attention_bias", False),
    )
