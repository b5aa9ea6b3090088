# SPDX-License-Identifier: MIT
"""A root-mean-square norm over all heads' queries together, and one over all heads' keys.

    QkMeanSquare      q, k                -> [T, 2] mean squares, summands where heads are divided
    QkNorm            mean squares, q, k  -> q', k'

All ranks have equally many heads, and a key head that several ranks have is on equally many as any
other: the mean over a token is the mean of the ranks' means.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.spmd.placement import Fused, ModuleSpec, Part, Partial, Shard, tokens


class QkMeanSquare(Layer):
    """q [T, Hq, D], k [T, Hk, D] -> [T, 2], in float32 or wider."""

    spec = ModuleSpec("mean_square", tokens(tp=Shard(1)), tokens(tp=Partial()))

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.wide = torch.promote_types(target.dtype, torch.float32)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        means = [x.flatten(1).to(self.wide).square().mean(1) for x in (q, k)]
        return torch.stack(means, 1)


class QkNorm(Layer):
    """q / sqrt(mean square + eps) * weight, and the same for k. Checkpoint: q_norm and k_norm."""

    q_weight: nn.Parameter
    k_weight: nn.Parameter

    def __init__(
        self, target: Target, q_size: int, kv_size: int, head_dim: int, eps: float
    ) -> None:
        super().__init__(target)
        parts = {
            "q_weight": Fused(0, (Part(q_size, {"tp": Shard(0)}, head_dim),)),
            "k_weight": Fused(0, (Part(kv_size, {"kv": Shard(0)}, head_dim),)),
        }
        self.spec = ModuleSpec("scale", tokens(), tokens(tp=Shard(1)), parts)
        self.eps = eps
        self.own_parameter("q_weight", (q_size,))
        self.own_parameter("k_weight", (kv_size,))

    def choose_kernels(self) -> None:
        (heads,) = self.cuts["q_weight"].dims[0]
        self.num_summands = heads.count
        self.q_kernel, self.k_kernel = (
            self.target.kernel("rms_norm", size=weight.shape[0])
            for weight in (self.q_weight, self.k_weight)
        )

    def norm_whole(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The same where one rank has all heads: no mean squares are needed."""
        normed_q: Tensor = self.q_kernel(q.flatten(1), self.q_weight, self.eps)
        normed_k: Tensor = self.k_kernel(k.flatten(1), self.k_weight, self.eps)
        return normed_q.view(q.shape), normed_k.view(k.shape)

    def forward(self, squares: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """squares [T, 2] summed over the ranks; q, k as they were -> the same, normed."""
        scales = torch.rsqrt(squares / self.num_summands + self.eps)
        normed_q = _scaled(q, scales[:, :1], self.q_weight)
        return normed_q, _scaled(k, scales[:, 1:], self.k_weight)

    def sources(self) -> Iterator[Source]:
        yield self.source("q_norm.weight", "q_weight")
        yield self.source("k_norm.weight", "k_weight")


def _scaled(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, D], scale [T, 1], weight [H * D]"""
    wide = x.flatten(1).to(scale.dtype) * scale * weight.to(scale.dtype)
    return wide.to(x.dtype).view(x.shape)
