# SPDX-License-Identifier: MIT
"""Grouped-query attention over paged keys and values, with optional q/k norm and biases."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenspeed.kernels.kv_int8 import SCALE_BYTES
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.linear import Linear, PairLinear
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.layers.qk_norm import QkMeanSquare, QkNorm
from tokenspeed.spmd.placement import Inline, ModuleSpec, Partial, Shard, tokens


@dataclass(frozen=True)
class GqaShape:
    """Sizes of one grouped-query attention, in features."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "token"] | None = None  # before rope: of each head, or of all at once
    norm_eps: float = 1e-6
    paired: bool = False  # q, k and v are made of two inputs side by side


class GqaAttention(Layer):
    """[T, hidden], where `paired` two of them -> [T, hidden].

    Child names are the checkpoint's: q_proj, k_norm, o_proj...
    `cos_sin` [positions, head_dim] is shared by all layers (`layers/rope.py`).
    """

    spec = ModuleSpec(outputs=tokens(tp=Partial()))

    def __init__(self, target: Target, shape: GqaShape, cos_sin: Tensor) -> None:
        super().__init__(target)
        self.shape, self.cos_sin = shape, cos_sin
        self.scale = shape.head_dim**-0.5
        q_size = shape.num_heads * shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        self.qkv_proj = (PairLinear if shape.paired else Linear)(
            target,
            shape.hidden_size * (2 if shape.paired else 1),
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=shape.qkv_bias,
            split="rows",
            unit=shape.head_dim,
            kv_parts=("k_proj", "v_proj"),
        )
        self.o_proj = Linear(
            target, q_size, {"o_proj": shape.hidden_size}, bias=shape.o_bias, split="columns"
        )
        attention = Inline("attention_gqa", "headwise")
        values = ("qkv_proj", attention, "o_proj")
        self.flows = (values,)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.qk_norm: QkNorm | None = None
        if shape.qk_norm == "token":
            self.qk_mean_square = QkMeanSquare(target)
            self.qk_norm = QkNorm(target, q_size, kv_size, shape.head_dim, shape.norm_eps)
            self.flows = (
                values,
                ("qkv_proj", "qk_mean_square", "qk_norm", attention, "o_proj"),
            )
        elif shape.qk_norm == "head":
            size, eps, heads = shape.head_dim, shape.norm_eps, tokens(tp=Shard(1))
            self.q_norm = RMSNorm(target, "q_norm", size, eps, "head_norm", heads)
            self.k_norm = RMSNorm(target, "k_norm", size, eps, "head_norm", heads)
            self.flows = (
                values,
                ("qkv_proj", "q_norm", attention, "o_proj"),
                ("qkv_proj", "k_norm", attention, "o_proj"),
            )

    def heads(self) -> list[int]:
        """Query, key and value heads on this rank."""
        return [size // self.shape.head_dim for size in self.qkv_proj.part_sizes()]

    def choose_kernels(self) -> None:
        self.parts = self.heads()
        sizes = {
            "num_heads": self.parts[0],
            "num_kv_heads": self.parts[1],
            "head_dim": self.shape.head_dim,
        }
        self.rope_append = self.target.kernel("rope_append_gqa", **sizes)
        self.attend = self.target.kernel("attention_gqa", **sizes)

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        """`dtype` uint8: int8 features and a scale for each head (`kernels/kv_int8.py`)."""
        head = self.shape.head_dim
        if dtype == torch.uint8:
            if self.target.device.type != "cpu":
                raise ValueError("kv_cache_dtype int8 is for device cpu: take auto or bfloat16")
            head += SCALE_BYTES
        rows = (self.heads()[1], head)
        return CacheSpec((rows, rows), dtype)

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], batch: ForwardBatch, cache: tuple[Tensor, ...]
    ) -> Tensor:
        keys, values = cache
        qkv = self.qkv_proj(*x) if isinstance(x, tuple) else self.qkv_proj(x)
        heads = qkv.view(len(qkv), sum(self.parts), self.shape.head_dim)
        q, k, v = torch.split_with_sizes(heads, self.parts, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm is not None and self.qk_norm.num_summands == 1:
            q, k = self.qk_norm.norm_whole(q, k)
        elif self.qk_norm is not None:
            q, k = self.qk_norm(self.qk_mean_square(q, k), q, k)
        q = self.rope_append(
            q, k, v, self.cos_sin, batch.positions, batch.cache_index, keys, values, False
        )
        y = self.attend(
            q,
            keys,
            values,
            batch.page_table,
            batch.slots,
            batch.q_start,
            batch.kv_len,
            self.scale,
            max_q_len=batch.max_q_len,
        )
        out: Tensor = self.o_proj(y.flatten(1))
        return out
