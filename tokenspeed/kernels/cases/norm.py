# SPDX-License-Identifier: MIT
"""Cases of the root-mean-square norms.

Squares are summed in float32: magnitudes up to 1e15 are in the domain, and down to denormals.
"""

from collections.abc import Iterator, Mapping

import torch

from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Work, floats

SHAPES = ((1, 1), (3, 7), (5, 128), (2, 1023), (40, 384), (1, 7168), (3, 5, 64), (0, 64))
REASON = "a float32 sum of squares and a reciprocal root"


def _norm(g: Inputs, *shape: int) -> Arguments:
    return g.normal(*shape), g.normal(shape[-1]), 1e-6


def _inside(g: Inputs, *shape: int) -> Arguments:
    x, weight, eps = _norm(g, *shape)
    return g.inside(x), weight, eps


def _scaled(g: Inputs, scale: float, eps: float) -> Arguments:
    return g.normal(4, 192, scale=scale), g.normal(192), eps


def _one_large(g: Inputs) -> Arguments:
    x = g.normal(3, 640, scale=1e-3)
    x[:, 77] = 3e4
    return x, g.normal(640), 1e-5


def _zeros(g: Inputs) -> Arguments:
    x = g.normal(3, 96)
    x[1] = 0.0
    return x, g.normal(96), 1e-6


def rms_norm_cases() -> Iterator[Case]:
    for shape in SHAPES:
        sizes = {"size": shape[-1]}
        name = "x".join(map(str, shape))
        yield Case(name, _norm, shape, sizes)
        yield Case(f"{name} strided", _inside, shape, sizes)
    yield Case("magnitude 1e15", _scaled, (1e15, 1e-6), {"size": 192})
    yield Case("magnitude 1e-20", _scaled, (1e-20, 1e-6), {"size": 192})
    yield Case("denormals", _scaled, (1e-39, 1e-6), {"size": 192})
    yield Case("one large value", _one_large, (), {"size": 640})
    yield Case("a row of zeros", _zeros, (), {"size": 96})


def _with_residual(g: Inputs, strided: bool, *shape: int) -> Arguments:
    x, weight, eps = _norm(g, *shape)
    residual = g.normal(*shape, scale=30.0)
    return (g.inside(x), g.inside(residual), weight, eps) if strided else (x, residual, weight, eps)


def _cancelling(g: Inputs) -> Arguments:
    x = g.normal(4, 256, scale=1e4)
    residual = -x
    residual[2] = 0.0
    return x, residual, g.normal(256), 1e-6


def add_rms_norm_cases() -> Iterator[Case]:
    for shape in ((1, 5), (7, 64), (33, 1000), (1, 7168), (0, 64)):
        for strided in (False, True):
            name = "x".join(map(str, shape)) + (" strided" if strided else "")
            yield Case(name, _with_residual, (strided, *shape), {"size": shape[-1]})
    yield Case("sums that cancel", _cancelling, (), {"size": 256})


def _sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _norm(g, tokens, shapes["size"])


def _add_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _with_residual(g, False, tokens, shapes["size"])


def _work(arguments: Arguments) -> Work:
    x = arguments[0]
    return Work(2.0 * x.nbytes, 4.0 * x.numel())


def _add_work(arguments: Arguments) -> Work:
    x = arguments[0]
    return Work(4.0 * x.nbytes, 5.0 * x.numel())


class _Alone:
    """A group of one rank, for ops that are fused with a collective."""

    index = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reduce_scatter(self, x: torch.Tensor, dim: int, sizes: list[int]) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int, sizes: list[int]) -> torch.Tensor:
        return x


def _reduced(g: Inputs, tokens: int) -> Arguments:
    return (*_with_residual(g, False, tokens, 96), _Alone())


def _scattered(g: Inputs, tokens: int) -> Arguments:
    return (*_reduced(g, tokens), [tokens])


def all_reduce_cases() -> Iterator[Case]:
    for tokens in (0, 1, 9):
        yield Case(f"T={tokens}, one rank", _reduced, (tokens,), {"size": 96})


def reduce_scatter_cases() -> Iterator[Case]:
    for tokens in (0, 1, 9):
        yield Case(f"T={tokens}, one rank", _scattered, (tokens,), {"size": 96})


TOLERANCE = floats(1e-6, 8e-3, REASON)
EXAMPLES = ({"size": 1024}, {"size": 7168})
CASES = (
    OpCases("rms_norm", rms_norm_cases, TOLERANCE, sized=_sized, work=_work, examples=EXAMPLES),
    OpCases(
        "add_rms_norm",
        add_rms_norm_cases,
        TOLERANCE,
        sized=_add_sized,
        work=_add_work,
        examples=EXAMPLES,
    ),
    OpCases("all_reduce_add_rms_norm", all_reduce_cases, TOLERANCE),
    OpCases("reduce_scatter_add_rms_norm", reduce_scatter_cases, TOLERANCE),
)
