# SPDX-License-Identifier: MIT
"""Multi-head latent attention: the cache keeps one latent per token, from which keys are made.

    absorbed:      score(t, s) = q_nope[t] W_UK . latent[s] + q_pe[t] . k_pe[s]
                   out[t]      = (softmax(score) latent) W_UV
    materialised:  score(t, s) = q_nope[t] . (W_UK latent[s]) + q_pe[t] . k_pe[s]
                   out[t]      = softmax(score) (W_UV latent)

Rows of many tokens are materialised, the others absorbed: `ForwardBatch.row_kinds`. W_UK and W_UV
are the two halves of the checkpoint's kv_b_proj. arXiv:2405.04434, section 2.1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenspeed.kernels.registry import Kernel, pack_of
from tokenspeed.layers.batch import ForwardBatch, LongRows, RowSet
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.layers.linear import Linear
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.spmd.placement import Inline, ModuleSpec, Partial, Shard, tokens

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

    w_uk: nn.Parameter
    w_uv: nn.Parameter

    def __init__(self, target: Target, shape: MlaShape) -> None:
        super().__init__(target)
        over, heads = tokens(tp=Shard(1)), {"tp": Shard(0)}
        self.spec = ModuleSpec("head_linear", over, over, {"w_uk": heads, "w_uv": heads})
        num_heads, latent = shape.num_heads, shape.kv_lora_rank
        self.own_parameter("w_uk", (num_heads, latent, shape.nope_dim))
        self.own_parameter("w_uv", (num_heads, shape.value_dim, latent))

    def choose_kernels(self) -> None:
        heads, latent, nope = self.w_uk.shape
        sizes = {"num_heads": heads, "num_inputs": nope, "num_outputs": latent}
        self.up = self.target.kernel("head_linear", **sizes)
        sizes = {"num_heads": heads, "num_inputs": latent, "num_outputs": self.w_uv.shape[1]}
        self.down = self.target.kernel("head_linear", **sizes)
        rows = heads * (nope + self.w_uv.shape[1])
        self.make = self.target.kernel("linear", num_inputs=latent, num_outputs=rows)

    def pack_weights(self) -> None:
        """Keeps kv_b_proj itself too, for keys and values of all heads in one product."""
        whole = torch.cat([self.w_uk.transpose(1, 2), self.w_uv], dim=1).flatten(0, 1)
        self.packed_kv = _packed(self.make, whole)
        self.packed_uk, self.packed_uv = _packed(self.up, self.w_uk), _packed(self.down, self.w_uv)
        for name, packed in (("w_uk", self.packed_uk), ("w_uv", self.packed_uv)):
            if packed is not self.get_parameter(name):
                self.give_up(name)

    def absorb_query(self, q_nope: Tensor) -> Tensor:
        """[T, H, nope] -> [T, H, latent]"""
        y: Tensor = self.up(q_nope, self.packed_uk)
        return y

    def expand_value(self, latent: Tensor) -> Tensor:
        """[T, H, latent] -> [T, H, value]"""
        y: Tensor = self.down(latent, self.packed_uv)
        return y

    def make_keys(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[S, latent] -> keys without position [S, H, nope], values [S, H, value]"""
        heads, _, nope = self.w_uk.shape
        both = self.make(latent, self.packed_kv, None).view(len(latent), heads, -1)
        return both[..., :nope], both[..., nope:]

    def sources(self) -> Iterator[Source]:
        heads, latent, nope = self.cuts["w_uk"].global_shape
        rows = nope + self.cuts["w_uv"].global_shape[1]
        (here,) = self.cuts["w_uk"].dims[0]
        pick = slice(here.start * rows, (here.start + here.piece) * rows), slice(0, latent)
        shape = (heads * rows, latent)
        yield Source("kv_b_proj.weight", shape, pick if self.holds("w_uk") else None, self._split)

    def _split(self, tensor: Tensor) -> None:
        heads, latent, nope = self.w_uk.shape
        both = tensor.view(heads, -1, latent)
        self.w_uk.copy_(both[:, :nope].transpose(1, 2))
        self.w_uv.copy_(both[:, nope:])


def _packed(kernel: Kernel, weight: Tensor) -> Any:
    """A weight that is never quantised, as its kernel wants it."""
    pack = pack_of(kernel)
    return weight if pack is None else pack(weight)


class MlaAttention(Layer):
    """[T, hidden] -> [T, hidden]. Child names are the checkpoint's: q_a_proj, kv_b_proj...

    `cos_sin` [positions, rope_dim] is shared by all layers (`layers/rope.py`).
    """

    spec = ModuleSpec(outputs=tokens(tp=Partial()))

    def __init__(self, target: Target, shape: MlaShape, cos_sin: Tensor) -> None:
        super().__init__(target)
        self.shape, self.cos_sin = shape, cos_sin
        hidden, rank = shape.hidden_size, shape.q_lora_rank
        latent = {"kv_a_proj_with_mqa": shape.kv_lora_rank + shape.rope_dim}
        head = shape.nope_dim + shape.rope_dim
        inputs = hidden if rank is None else rank
        name = "q_proj" if rank is None else "q_b_proj"
        self.q_proj = Linear(
            target, inputs, {name: shape.num_heads * head}, split="rows", unit=head
        )
        down = latent if rank is None else {"q_a_proj": rank, **latent}
        self.a_proj = Linear(target, hidden, down, bias=shape.bias)
        if rank is not None:
            self.q_a_layernorm = RMSNorm(target, "q_a_layernorm", rank, LORA_NORM_EPS)
        self.kv_a_layernorm = RMSNorm(target, "kv_a_layernorm", shape.kv_lora_rank, LORA_NORM_EPS)
        self.kv_b_proj = AbsorbedKv(target, shape)
        o_inputs = shape.num_heads * shape.value_dim
        self.o_proj = Linear(target, o_inputs, {"o_proj": hidden}, bias=shape.bias, split="columns")
        query = ("q_proj",) if rank is None else ("a_proj", "q_a_layernorm", "q_proj")
        attention, cache = Inline("attention_mla", "headwise"), Inline("latent_cache", "shared")
        self.flows = (
            (*query, "kv_b_proj", attention, "kv_b_proj", "o_proj"),
            (*query, attention, "kv_b_proj", "o_proj"),  # features with position
            ("a_proj", "kv_a_layernorm", cache),
            ("a_proj", cache),  # features with position
        )
        self.parts = [] if rank is None else [rank]
        self.parts += [shape.kv_lora_rank, shape.rope_dim]
        self.head_parts = [shape.nope_dim, shape.rope_dim]

    def choose_kernels(self) -> None:
        self.num_heads = self.kv_b_proj.w_uk.shape[0]
        sizes = {
            "num_heads": self.num_heads,
            "latent_dim": self.shape.kv_lora_rank,
            "rope_dim": self.shape.rope_dim,
        }
        self.rope_append = self.target.kernel("rope_append_mla", **sizes)
        self.attend = self.target.kernel("attention_mla", **sizes)
        self.gather = self.target.kernel("gather_latent")
        sizes = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_heads,
            "head_dim": self.shape.nope_dim,
            "tail_dim": self.shape.rope_dim,
            "value_dim": self.shape.value_dim,
        }
        self.attend_made = self.target.kernel("attention_ragged", **sizes)
        self.merge = self.target.kernel("merge_state")

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        if dtype == torch.uint8:
            raise ValueError(
                "kv_cache_dtype int8 is for grouped-query attention; latents stay as they are: "
                "take auto, bfloat16 or float32"
            )
        return CacheSpec(((self.shape.kv_lora_rank + self.shape.rope_dim,),), dtype)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: tuple[Tensor, ...]) -> Tensor:
        shape = self.shape
        parts = torch.split_with_sizes(self.a_proj(x), self.parts, 1)
        latent, k_pe = parts[-2:]
        q = self.q_proj(x if shape.q_lora_rank is None else self.q_a_layernorm(parts[0]))
        heads = q.view(len(q), self.num_heads, shape.nope_dim + shape.rope_dim)
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
        y = self._attend(q_nope, q_pe, cache[0], batch)
        out: Tensor = self.o_proj(y.flatten(1))
        return out

    def _attend(self, q_nope: Tensor, q_pe: Tensor, cache: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, H, nope], [T, H, rope] -> [T, H, value]"""
        short, long = batch.row_kinds
        if long is None:
            return self._absorbed(q_nope, q_pe, cache, batch, short)
        few, many = short.tokens, long.rows.tokens
        if few is None or many is None:
            return self._materialised(q_nope, q_pe, cache, batch, long)
        y = q_nope.new_empty(*q_nope.shape[:2], self.shape.value_dim)
        y[few] = self._absorbed(q_nope[few], q_pe[few], cache, batch, short)
        y[many] = self._materialised(q_nope[many], q_pe[many], cache, batch, long)
        return y

    def _absorbed(
        self, q_nope: Tensor, q_pe: Tensor, cache: Tensor, batch: ForwardBatch, rows: RowSet
    ) -> Tensor:
        y = self.attend(
            self.kv_b_proj.absorb_query(q_nope),
            q_pe,
            cache,
            batch.page_table,
            rows.slots,
            rows.q_start,
            rows.kv_len,
            self.shape.softmax_scale,
            max_q_len=batch.max_q_len,
        )
        return self.kv_b_proj.expand_value(y)

    def _materialised(
        self, q_nope: Tensor, q_pe: Tensor, cache: Tensor, batch: ForwardBatch, long: LongRows
    ) -> Tensor:
        state: tuple[Tensor, Tensor] | None = None
        rank, table = self.shape.kv_lora_rank, batch.page_table
        for piece in long.pieces:
            made_from = self.gather(
                cache, table, long.rows.slots, piece.first, piece.starts, piece.num_keys, q_pe.dtype
            )
            keys, values = self.kv_b_proj.make_keys(made_from[:, :rank])
            part = self.attend_made(
                q_nope,
                keys,
                values,
                long.rows.q_start,
                piece.starts,
                self.shape.softmax_scale,
                piece.causal,
                q_pe,
                made_from[:, rank:],
            )
            state = part if state is None else self.merge(*state, *part)
        if state is None:
            raise RuntimeError("long rows have no keys of their own")
        return state[0]
