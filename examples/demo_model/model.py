# SPDX-License-Identifier: MIT
"""A DeepSeek-V3 decoder with one multi-token-prediction layer, written for training on a CPU.

Module names are the tensor names of a published DeepSeek-V3 checkpoint, so `state_dict()` is the
checkpoint. Every expert runs on every token and the router's zeros mask the result: at this size
one large matrix product beats gathering tokens. Refuses to know about data, optimizers, caches
and generation. Source: DeepSeek-V3 Technical Report, arXiv:2412.19437.
"""

from typing import cast

import torch
import torch.nn.functional as F
from shape import Shape
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# The head shares the embedding. A large embedding is heard beside what the blocks add to it, and
# a small gain before the head undoes its size there.
EMBEDDING_SCALE = 32.0


def is_head_norm(name: str) -> bool:
    return name == "model.norm.weight" or "shared_head.norm" in name


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
        return (x32 * scale * self.weight).type_as(x)


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of the last axis; the pairs come out as halves."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).type_as(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, heads, length, size] each; a row block never computes scores far above its diagonal.

    Four blocks of plain matrix products, fused by the compiler, beat the CPU's flash kernel.
    """
    length, size = q.shape[2], q.shape[3]
    block = -(-length // 4)
    outs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = (q[:, :, start:stop] @ k[:, :, :stop].transpose(2, 3)).float() * size**-0.5
        hidden = torch.arange(stop) > torch.arange(start, stop).unsqueeze(1)
        outs.append(scores.masked_fill(hidden, -1e30).softmax(-1).to(v.dtype) @ v[:, :, :stop])
    return torch.cat(outs, dim=2)


class Attention(nn.Module):
    """Multi-head latent attention, expanded to ordinary heads."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.heads, self.kv_rank = c.num_attention_heads, c.kv_lora_rank
        self.nope, self.rope, self.value = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank)
        self.q_b_proj = linear(c.q_lora_rank, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(c.hidden_size, self.kv_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.kv_rank)
        self.kv_b_proj = linear(self.kv_rank, self.heads * (self.nope + self.value))
        self.o_proj = linear(self.heads * self.value, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, length, self.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv = kv.view(batch, length, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, self.heads, -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        if length > 1024:  # the scores of a long row are made again for the backward pass
            out = checkpoint(causal_attention, q, k, v, use_reentrant=False)
        else:
            out = causal_attention(q, k, v)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        projected: Tensor = self.o_proj(out)
        return projected


class Router(nn.Module):
    """Sigmoid scores; the bias steers the choice of experts and never the weights."""

    e_score_correction_bias: Tensor
    load: Tensor  # tokens per expert since the trainer last zeroed it

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups = c.num_experts_per_tok, c.n_group, c.topk_group
        self.scale = c.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.register_buffer("load", torch.zeros(c.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to the weight of every expert, [tokens, experts], zero if unchosen."""
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            choice = (scores + self.e_score_correction_bias).view(len(scores), self.groups, -1)
            group_scores = choice.topk(2, dim=-1)[0].sum(-1)
            chosen = group_scores.topk(self.top_groups, dim=-1)[1]
            keep = torch.zeros_like(group_scores).scatter(1, chosen, 1.0).bool()
            choice = choice.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)
            experts = choice.topk(self.top_k, dim=-1)[1]
            mask = torch.zeros_like(scores).scatter(1, experts, 1.0)
            self.load.add_(mask.sum(0))
        weights = scores * mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale


class MoE(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.gate = Router(c)
        inner = c.moe_intermediate_size
        self.experts = nn.ModuleList(MLP(c.hidden_size, inner) for _ in range(c.n_routed_experts))
        self.shared_experts = MLP(c.hidden_size, inner * c.n_shared_experts)

    def stacked(self, name: str, dim: int) -> Tensor:
        return torch.cat([getattr(e, name).weight for e in self.experts], dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights = self.gate(flat).to(flat.dtype)
        gate = F.linear(flat, self.stacked("gate_proj", 0))
        up = F.linear(flat, self.stacked("up_proj", 0))
        inner = (F.silu(gate) * up).view(len(flat), len(self.experts), -1)
        inner = (inner * weights.unsqueeze(-1)).flatten(1)
        routed = F.linear(inner, self.stacked("down_proj", 1))
        out: Tensor = routed.view_as(x) + self.shared_experts(x)
        return out


class Layer(nn.Module):
    def __init__(self, c: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size)
        dense = index < c.first_k_dense_replace
        self.mlp = MLP(c.hidden_size, c.intermediate_size) if dense else MoE(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class SharedHead(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.norm = RMSNorm(c.hidden_size)


class MTPLayer(Layer):
    """Predicts token i + 2 from the final hidden state at i and the embedding of token i + 1."""

    def __init__(self, c: Shape) -> None:
        super().__init__(c, c.num_hidden_layers)
        self.enorm = RMSNorm(c.hidden_size)
        self.hnorm = RMSNorm(c.hidden_size)
        self.eh_proj = linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = SharedHead(c)

    def draft(self, embedding: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        joined = torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)
        out: Tensor = self.shared_head.norm(self(self.eh_proj(joined), cos, sin))
        return out


class Decoder(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        layers: list[Layer] = [Layer(c, i) for i in range(c.num_hidden_layers)]
        self.layers = nn.ModuleList([*layers, MTPLayer(c)])
        self.norm = RMSNorm(c.hidden_size)
        rope = c.qk_rope_head_dim
        self.frequencies = c.rope_theta ** (-torch.arange(0, rope, 2, dtype=torch.float) / rope)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, length + 1] ids to final hidden states [batch, length, hidden], main and MTP."""
        angles = torch.outer(torch.arange(tokens.shape[1] - 1).float(), self.frequencies)
        cos, sin = angles.cos(), angles.sin()
        embedded = self.embed_tokens(tokens)
        x = embedded[:, :-1]
        for layer in self.layers[:-1]:
            x = layer(x, cos, sin)
        hidden = self.norm(x)
        drafter = cast(MTPLayer, self.layers[-1])
        return hidden, drafter.draft(embedded[:, 1:], hidden, cos, sin)


class DemoModel(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.model = Decoder(c)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # every block starts as the identity
            elif name.endswith("gate.weight"):
                nn.init.normal_(parameter, std=c.initializer_range)
            elif name.endswith("embed_tokens.weight"):
                nn.init.normal_(parameter, std=c.initializer_range * EMBEDDING_SCALE)
            elif is_head_norm(name):
                nn.init.constant_(parameter, 1 / EMBEDDING_SCALE)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, length + 2] ids to the two mean losses in nats per token."""
        hidden, draft = self.model(tokens[:, :-1])
        return self.loss(hidden, tokens[:, 1:-1]), self.loss(draft, tokens[:, 2:])

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, self.model.embed_tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
