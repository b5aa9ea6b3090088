# SPDX-License-Identifier: MIT
"""`DecoderModel`: what the files of all decoder-only models have in common.

A model's file says which attention and which feed-forward block stand in a layer and reads the
keys that only it has; sizes, rope and the stack of layers are made here.
"""

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tokenspeed.kernels.quant import Quantization
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.mlp import MLP
from tokenspeed.layers.rope import rope_table
from tokenspeed.models.causal_lm import CausalLM, DecoderLayer
from tokenspeed.models.decoder_config import DecoderConfig, read_decoder, read_heads
from tokenspeed.models.hf_config import HfConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Build:
    """What the blocks of one model are made of."""

    target: Target
    config: HfConfig
    decoder: DecoderConfig
    cos_sin: Tensor  # [positions, rotated features], shared by all layers


class DecoderModel(CausalLM):
    """Subclasses give `attention` and, unless all layers are dense, `feed_forward`."""

    default_head_dim: ClassVar[int | None] = None  # None: hidden_size / num_attention_heads
    num_mtp_layers: int = 0  # behind the last layer; they predict several tokens ahead

    @classmethod
    def from_config(
        cls,
        hf_config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
        quantization: Quantization | None = None,
    ) -> Self:
        config, target = HfConfig(hf_config), Target(device, dtype, quantization)
        rope_dim = cls.rope_dim(config)
        decoder = read_decoder(config, rope_dim=rope_dim, max_model_len=max_model_len)
        cos_sin = rope_table(decoder.rope, decoder.max_position, device)
        build = Build(target, config, decoder, cos_sin)
        layers = [
            DecoderLayer(target, decoder, cls.attention(build), cls.feed_forward(build, index))
            for index in range(decoder.num_layers)
        ]
        model = cls(target, decoder, layers)
        model.num_mtp_layers = cls.read_mtp_layers(config)
        return model

    @classmethod
    @abstractmethod
    def attention(cls, build: Build) -> Layer:
        """The attention of every layer."""

    @classmethod
    def feed_forward(cls, build: Build, index: int) -> Layer:
        """The block after the attention of layer `index`; dense unless overridden."""
        inner = build.config.integer("intermediate_size")
        bias = build.config.boolean("mlp_bias", False)
        return MLP(build.target, build.decoder.hidden_size, inner, bias=bias)

    @classmethod
    def rope_dim(cls, config: HfConfig) -> int:
        """How many features of a head turn with its position; all of them unless overridden."""
        return read_heads(config, default_head_dim=cls.default_head_dim)[2]

    @classmethod
    def read_mtp_layers(cls, config: HfConfig) -> int:
        """Layers behind the last one whose weights are known and set aside."""
        return 0

    def sets_aside(self, name: str) -> bool:
        layer, first = _LAYER.match(name), self.config.num_layers
        if layer is not None and first <= int(layer[1]) < first + self.num_mtp_layers:
            return True
        return super().sets_aside(name)
