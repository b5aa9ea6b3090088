# SPDX-License-Identifier: MIT
"""`CausalLM`: the frame of every decoder-only model, from token ids to logits.

Module names are the checkpoint's tensor names, so that a module's path tells which tensors fill
it. Refuses to know the kind of attention and feed-forward; a model's file gives it finished layers.
"""

from abc import abstractmethod
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tokenspeed.errors import ModelLoadError
from tokenspeed.kernels.quant import Quantization
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.embedding import Embedding, LMHead
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.norm import ResidualNorm
from tokenspeed.models.decoder_config import DecoderConfig
from tokenspeed.models.decoder_layer import Attention, DecoderLayer
from tokenspeed.models.mtp import MtpModule
from tokenspeed.spmd.localise import Spmd
from tokenspeed.spmd.placement import Flow


class Decoder(Layer):
    """Token ids [T] to normalised hidden states [T, hidden]."""

    flows = (("embed_tokens", "layers", "norm"),)

    def __init__(self, target: Target, config: DecoderConfig, layers: list[DecoderLayer]) -> None:
        super().__init__(target)
        self.embed_tokens = Embedding(target, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = ResidualNorm(target, "norm", config.hidden_size, config.norm_eps)
        self.aux_layers: tuple[int, ...] = ()
        self.heard: list[Tensor] = []

    def hear(self, layers: tuple[int, ...]) -> None:
        """From now on `heard` holds the residual stream after each of these layers, which rise."""
        members = cast(list[DecoderLayer], list(self.layers))
        if list(layers) != sorted(set(layers) & set(range(len(members)))):
            raise ValueError(f"aux_layers {layers}: must rise and name some of {len(members)}")
        self.aux_layers = layers
        for index, layer in enumerate(members):
            layer.heard = self.heard if index - 1 in layers else None

    def forward(self, batch: ForwardBatch, caches: list[tuple[Tensor, ...]]) -> Tensor:
        if self.aux_layers:
            self.heard.clear()
        hidden: Tensor = self.embed_tokens(batch.token_ids)
        residual: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, residual = layer(hidden, residual, batch, cache)
        hidden, residual = self.norm.add(hidden, residual)
        if len(self.heard) < len(self.aux_layers):
            self.heard.append(residual)
        return hidden


class CausalLM(Layer):
    """A model that the engine can run. Its parameters are on the meta device until loaded."""

    flows: tuple[Flow, ...] = (("model", "lm_head"),)
    spmd: Spmd  # once it is built for a rank (`models/build.py`)

    def __init__(self, target: Target, config: DecoderConfig, layers: list[DecoderLayer]) -> None:
        super().__init__(target)
        self.config = config
        self.vocab_size, self.max_position = config.vocab_size, config.max_position
        self.model = Decoder(target, config, layers)
        self.lm_head = LMHead(target, self.model.embed_tokens, tied=config.tied)
        self.mtp: MtpModule | None = None
        self.aux_hidden: list[Tensor] = []

    def add_mtp(self) -> None:
        """Gives the model the first module that predicts a token further: `mtp`.

        Before it is divided over ranks and filled. `ModelLoadError`: the model has none.
        """
        raise ModelLoadError(f"{type(self).__name__} has no layers that predict further tokens")

    def _take_mtp(self, block: DecoderLayer) -> None:
        self.mtp = MtpModule(self.target, self.config, self.model.embed_tokens, block)
        self.flows = (*self.flows, ("model", "mtp", "lm_head"))

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Layers whose residual streams, [T, hidden] whole, each `forward` leaves in `aux_hidden`.

        Layer i's is what enters layer i + 1. `ValueError`: no such layers, or not in order.
        """
        return self.model.aux_layers

    @aux_layers.setter
    def aux_layers(self, layers: tuple[int, ...]) -> None:
        self.model.hear(layers)

    @classmethod
    @abstractmethod
    def from_config(
        cls,
        hf_config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
        quantization: Quantization | None = None,
    ) -> Self:
        """Builds the model without reading weights. `ModelLoadError` names an unsupported key.

        `hf_config` is the language model's part of config.json; `quantization` says how weights
        shall be held, whatever the checkpoint holds.
        """

    def forward(self, batch: ForwardBatch, caches: list[tuple[Tensor, ...]]) -> Tensor:
        """One step over all tokens of the batch; appends their keys and values: [T, hidden]."""
        hidden: Tensor = self.model(batch, caches)
        if self.aux_layers:
            self.aux_hidden = [self.spmd.gather_stream(x) for x in self.model.heard]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, hidden] -> float32 [L, vocab]"""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def cache_specs(self, dtype: torch.dtype | None = None) -> list[CacheSpec]:
        """What each layer of this rank keeps per token; `dtype` defaults to the model's."""
        kept = dtype or self.target.dtype
        layers = cast(list[DecoderLayer], list(self.model.layers))
        return [cast(Attention, layer.self_attn).cache_spec(kept) for layer in layers]

    def checkpoint_name(self, name: str) -> str:
        """What the checkpoint calls the tensor that is `name` by its module's path."""
        return name

    def sets_aside(self, name: str) -> bool:
        """Whether a checkpoint tensor that no module asks for is known and left out on purpose."""
        tied_head = self.config.tied and name == "lm_head.weight"
        return tied_head or name.endswith(".rotary_emb.inv_freq")
