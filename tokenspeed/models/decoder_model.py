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
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.decoder_config import DecoderConfig, read_decoder, read_heads
from tokenspeed.models.decoder_layer import DecoderLayer
from tokenspeed.models.hf_config import HfConfig
from tokenspeed.models.mtp import SHARED

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
    build: Build

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
        layers = [cls._layer(build, index) for index in range(decoder.num_layers)]
        model = cls(target, decoder, layers)
        model.num_mtp_layers = cls.read_mtp_layers(config)
        model.build = build
        return model

    @classmethod
    def _layer(cls, build: Build, index: int) -> DecoderLayer:
        attention, mlp = cls.attention(build), cls.feed_forward(build, index)
        return DecoderLayer(build.target, build.decoder, attention, mlp)

    def add_mtp(self) -> None:
        """Modules behind the first are set aside: it goes on by itself."""
        if not self.num_mtp_layers:
            super().add_mtp()
        self._take_mtp(self._layer(self.build, self.config.num_layers))

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
        """Layers behind the last one that predict further tokens; set aside unless asked for."""
        return 0

    def checkpoint_name(self, name: str) -> str:
        here = f"model.layers.{self.config.num_layers}."
        return re.sub(r"^mtp\.(block\.)?", here, name)

    def sets_aside(self, name: str) -> bool:
        layer, first = _LAYER.match(name), self.config.num_layers
        if layer is not None and first <= int(layer[1]) < first + self.num_mtp_layers:
            is_first = self.mtp is not None and int(layer[1]) == first
            return not is_first or name[layer.end() :] in SHARED
        return super().sets_aside(name)
