# SPDX-License-Identifier: MIT
"""Multi-head latent attention in its absorbed form: keys and values stay one latent per token.

    score(t, s) = q_nope[t] W_UK . latent[s] + q_pe[t] . k_pe[s]
    out[t]      = (softmax(score) latent) W_UV

W_UK and W_UV are the two halves of the checkpoint's kv_b_proj. arXiv:2405.04434, section 2.1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.layers.linear import Linear
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.spmd.placement import ModuleSpec, Partial, Shard

LORA_NORM_EPS = 1e-6  # the release's inner norms do not follow rms_norm_eps


@dataclass(frozen=True)
class MlaShape:
    """Sizes of one latent attention, in features."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int  # features per head of q and k without position
    rope_dim: int  # features per head of q, and of the one shared k, with position
    value_dim: int
    softmax_scale: float  # YaRN's factor included
    interleaved: bool = True  # rope pairs are (0, 1), (2, 3), ...
    bias: bool = False  # on the down projections and o


class AbsorbedKv(Layer):
    """kv_b_proj [heads * (nope + value), latent] as two stacks of per-head weights.

    w_uk [H, latent, nope] takes queries to the latent, w_uv [H, value, latent] brings values back.
    """

    def __init__(self, target: Target, shape: MlaShape) -> None:
        super().__init__()
        heads, over = {"tp": Shard(0)}, {"tp": Shard(1)}
        self.spec = ModuleSpec(over, over, {"w_uk": heads, "w_uv": heads})
        num_heads, latent = shape.num_heads, shape.kv_lora_rank
        self.w_uk = self.own_parameter((num_heads, latent, shape.nope_dim), target.dtype)
        self.w_uv = self.own_parameter((num_heads, shape.value_dim, latent), target.dtype)
        sizes = {"num_heads": num_heads, "num_inputs": shape.nope_dim, "num_outputs": latent}
        self.up = target.kernel("head_linear", **sizes)
        sizes = {"num_heads": num_heads, "num_inputs": latent, "num_outputs": shape.value_dim}
        self.down = target.kernel("head_linear", **sizes)

    def absorb_query(self, q_nope: Tensor) -> Tensor:
        """[T, H, nope] -> [T, H, latent]"""
        y: Tensor = self.up(q_nope, self.w_uk)
        return y

    def expand_value(self, latent: Tensor) -> Tensor:
        """[T, H, latent] -> [T, H, value]"""
        y: Tensor = self.down(latent, self.w_uv)
        return y

    def sources(self) -> Iterator[Source]:
        heads, latent, nope = self.w_uk.shape
        shape = (heads * (nope + self.w_uv.shape[1]), latent)
        yield Source("kv_b_proj.weight", shape, self._split)

    def _split(self, tensor: Tensor) -> None:
        heads, latent, nope = self.w_uk.shape
        both = tensor.view(heads, -1, latent)
        self.w_uk.copy_(both[:, :nope].transpose(1, 2))
        self.w_uv.copy_(both[:, nope:])


class MlaAttention(Layer):
    """[T, hidden] -> [T, hidden]. Child names are the checkpoint's: q_a_proj, kv_b_proj...

    `cos_sin` [positions, rope_dim] is shared by all layers (`layers/rope.py`).
    """

    def __init__(self, target: Target, shape: MlaShape, cos_sin: Tensor) -> None:
        super().__init__()
        self.shape, self.cos_sin = shape, cos_sin
        hidden, rank = shape.hidden_size, shape.q_lora_rank
        latent = {"kv_a_proj_with_mqa": shape.kv_lora_rank + shape.rope_dim}
        heads = shape.num_heads * (shape.nope_dim + shape.rope_dim)
        self.spec = ModuleSpec(outputs={"tp": Partial()})
        if rank is None:
            self.q_proj = Linear(target, hidden, {"q_proj": heads}, split="rows")
            self.a_proj = Linear(target, hidden, latent, bias=shape.bias)
            query: tuple[str, ...] = ("q_proj",)
        else:
            self.a_proj = Linear(target, hidden, {"q_a_proj": rank, **latent}, bias=shape.bias)
            self.q_a_layernorm = RMSNorm(target, "q_a_layernorm", rank, LORA_NORM_EPS)
            self.q_proj = Linear(target, rank, {"q_b_proj": heads}, split="rows")
            query = ("a_proj", "q_a_layernorm", "q_proj")
        self.kv_a_layernorm = RMSNorm(target, "kv_a_layernorm", shape.kv_lora_rank, LORA_NORM_EPS)
        self.kv_b_proj = AbsorbedKv(target, shape)
        self.o_proj = Linear(
            target,
            shape.num_heads * shape.value_dim,
            {"o_proj": hidden},
            bias=shape.bias,
            split="columns",
        )
        self.flows = (
            (*query, "kv_b_proj", "o_proj"),
            ("a_proj", "kv_a_layernorm", "kv_b_proj", "o_proj"),
        )
        self.parts = [] if rank is None else [rank]
        self.parts += [shape.kv_lora_rank, shape.rope_dim]
        self.head_parts = [shape.nope_dim, shape.rope_dim]
        self._choose_kernels(target)

    def _choose_kernels(self, target: Target) -> None:
        sizes = {
            "num_heads": self.shape.num_heads,
            "latent_dim": self.shape.kv_lora_rank,
            "rope_dim": self.shape.rope_dim,
        }
        self.rope_append = target.kernel("rope_append_mla", **sizes)
        self.attend = target.kernel("attention_mla", **sizes)

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        return CacheSpec(((self.shape.kv_lora_rank + self.shape.rope_dim,),), dtype)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: tuple[Tensor, ...]) -> Tensor:
        shape, num_tokens = self.shape, x.shape[0]
        parts = torch.split_with_sizes(self.a_proj(x), self.parts, 1)
        latent, k_pe = parts[-2:]
        q = self.q_proj(x if shape.q_lora_rank is None else self.q_a_layernorm(parts[0]))
        heads = q.view(num_tokens, shape.num_heads, -1)
        q_nope, q_pe = torch.split_with_sizes(heads, self.head_parts, 2)
        q_pe = self.rope_append(
            q_pe,
            k_pe,
            self.kv_a_layernorm(latent),
            self.cos_sin,
            batch.positions,
            batch.cache_index,
            cache[0],
            shape.interleaved,
        )
        y = self.attend(
            self.kv_b_proj.absorb_query(q_nope),
            q_pe,
            cache[0],
            batch.page_table,
            batch.slots,
            batch.q_start,
            batch.kv_len,
            shape.softmax_scale,
        )
        out: Tensor = self.o_proj(self.kv_b_proj.expand_value(y).reshape(num_tokens, -1))
        return out
