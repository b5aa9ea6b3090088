# SPDX-License-Identifier: MIT
"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on q, k and v. arXiv:2407.10671."""

from tokenspeed.layers.attention_gqa import GqaAttention, GqaShape
from tokenspeed.models.decoder_config import read_heads
from tokenspeed.models.decoder_model import Build, DecoderModel


class Qwen2ForCausalLM(DecoderModel):
    """Every layer the same: grouped-query attention and a gated feed-forward."""

    @classmethod
    def attention(cls, build: Build) -> GqaAttention:
        heads = read_heads(build.config)
        shape = GqaShape(build.decoder.hidden_size, *heads, qkv_bias=True)
        return GqaAttention(build.target, shape, build.cos_sin)
