# SPDX-License-Identifier: MIT
"""What the residual stream meets: norms with a fused collective, and the borders of stages.

A norm of the stream (`ModuleSpec` kind "residual_norm") has `weight`, `eps`, a kernel `norm_kernel`
and `add(x, residual)`; here is what stands in place of that `add`. Knows no attention and no
experts.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Kernel
from tokenspeed.spmd.group import Group
from tokenspeed.spmd.program import Step, piece, piece_start

Pair = tuple[Tensor, Tensor]
Arrival = Literal["summand", "whole", "laid"]  # over tp; "laid": as the stream lies already


class Stream:
    """How the residual stream lies: whole on every tp rank, or in pieces where a step is split."""

    def __init__(self, step: Step, tp: Group | None) -> None:
        self.step, self.tp = step, tp

    def sizes(self) -> list[int]:
        """Tokens in each tp rank's piece."""
        count = len(self.tp.ranks) if self.tp else 1
        return [piece(self.step.own, count, at) for at in range(count)]

    def num_rows(self) -> int:
        """Tokens that this rank keeps of the stream."""
        if self.tp is None or not self.step.split:
            return self.step.own
        return piece(self.step.own, len(self.tp.ranks), self.tp.index)

    def cut(self, x: Tensor) -> Tensor:
        """This rank's piece of whole rows."""
        if self.tp is None:
            return x
        start = piece_start(self.step.own, len(self.tp.ranks), self.tp.index)
        return x[start : start + self.num_rows()]


class StreamNorm:
    """`add` of a norm of the stream, for what arrives as `arrival` says."""

    def __init__(
        self, norm: Any, stream: Stream, arrival: Arrival, reduce: Kernel, scatter: Kernel
    ) -> None:
        self._norm, self._stream, self._arrival = norm, stream, arrival
        self._reduce, self._scatter = reduce, scatter

    def __call__(self, x: Tensor, residual: Tensor | None) -> Pair:
        """(norm(x + residual) whole, x + residual as the stream lies)."""
        norm, stream, tp = self._norm, self._stream, self._stream.tp
        if residual is None:
            x = self.arrive(x)
            return self._leave(norm.norm_kernel(x, norm.weight, norm.eps)), x
        if self._arrival == "summand" and tp is not None:
            if not stream.step.split:
                reduced: Pair = self._reduce(x, residual, norm.weight, norm.eps, tp)
                return reduced
            sizes = stream.sizes()
            scattered: Pair = self._scatter(x, residual, norm.weight, norm.eps, tp, sizes)
            return scattered
        normed, total = norm.add_kernel(self.arrive(x), residual, norm.weight, norm.eps)
        return self._leave(normed), total

    def arrive(self, x: Tensor) -> Tensor:
        """What arrives, laid as the stream lies."""
        stream = self._stream
        if stream.tp is None or self._arrival == "laid":
            return x
        if self._arrival == "whole":
            return stream.cut(x) if stream.step.split else x
        if stream.step.split:
            return stream.tp.reduce_scatter(x, 0, stream.sizes())
        return stream.tp.all_reduce(x)

    def _leave(self, normed: Tensor) -> Tensor:
        stream = self._stream
        if stream.tp is None or not stream.step.split:
            return normed
        return stream.tp.all_gather(normed, 0, stream.sizes())


class StageExit:
    """`add` of the norm after the layers, on every stage but the last: the stream goes on."""

    def __init__(self, arrive: StreamNorm, pipeline: Group) -> None:
        self._arrive, self._pipeline = arrive, pipeline

    def __call__(self, x: Tensor, residual: Tensor | None) -> Pair:
        total = self._arrive.arrive(x)
        if residual is not None:
            total = total + residual
        self._pipeline.send(total.contiguous(), self._pipeline.index + 1)
        return total, total


class StageEntry:
    """`forward` of the module before the layers, on every stage but the first."""

    def __init__(
        self, width: int, dtype: torch.dtype, device: torch.device, stream: Stream, pipeline: Group
    ) -> None:
        self._width, self._options = width, {"dtype": dtype, "device": device}
        self._stream, self._pipeline = stream, pipeline

    def __call__(self, _ids: Tensor) -> Tensor:
        shape = (self._stream.num_rows(), self._width)
        buffer = torch.empty(shape, **self._options)  # type: ignore[call-overload]
        return self._pipeline.receive(buffer, self._pipeline.index - 1)
