# SPDX-License-Identifier: MIT
"""Cases of routing, gated activation and routed experts. Experts that nobody chose are NaN."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Tolerance, Work, floats
from tokenspeed.kernels.cases.ragged import NAN

Rule = tuple[int, str, int, int, str, bool, float]  # as `route` takes them, after the bias


def _silu(g: Inputs, tokens: int, size: int, scale: float) -> Arguments:
    return (g.inside(g.normal(tokens, 2 * size, scale=scale)),)


def _extremes(g: Inputs) -> Arguments:
    gates = torch.tensor([-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-38, 200.0, 1e30])
    return (torch.cat([gates, torch.ones(8)])[None].to(g.dtype),)


def silu_mul_cases() -> Iterator[Case]:
    for tokens, size in ((0, 8), (1, 1), (3, 19), (70, 512), (1, 3072)):
        yield Case(f"T={tokens} {size}", _silu, (tokens, size, 4.0), {"size": size})
    yield Case("small values", _silu, (5, 40, 1e-18), {"size": 40})
    yield Case("extreme gates", _extremes, (), {"size": 8})


def _route(
    g: Inputs, tokens: int, experts: int, rule: Rule, biased: bool, scale: float
) -> Arguments:
    bias = g.normal(experts, scale=0.1) if biased else None
    return g.normal(tokens, experts, scale=scale), bias, *rule


def _ties(g: Inputs, experts: int, rule: Rule) -> Arguments:
    """Logits of four values only: lower ids come first."""
    return g.integers(0, 4, 40, experts).float(), None, *rule


def route_cases() -> Iterator[Case]:
    rules: tuple[tuple[int, Rule, bool], ...] = (
        (8, (2, "softmax", 1, 1, "max", True, 1.0), False),
        (61, (6, "softmax", 1, 1, "max", False, 16.0), False),
        (16, (4, "sigmoid", 4, 2, "top2", True, 2.5), True),
        (24, (3, "softmax", 3, 1, "max", False, 1.0), False),
        (256, (8, "sigmoid", 8, 4, "top2", True, 2.5), True),
        (128, (8, "softmax", 1, 1, "max", True, 1.0), False),
        (4, (4, "sigmoid", 1, 1, "top2", True, 1.0), True),
        (1, (1, "softmax", 1, 1, "max", True, 1.0), False),
    )
    for experts, rule, biased in rules:
        sizes = {"num_experts": experts}
        name = f"{rule[0]} of {experts}, {rule[1]}, {rule[3]} of {rule[2]} groups"
        yield Case(name, _route, (70, experts, rule, biased, 3.0), sizes)
        yield Case(f"{name}, ties", _ties, (experts, rule), sizes)
    sizes, rule = {"num_experts": 16}, rules[2][1]
    for tokens in (0, 1):
        yield Case(f"T={tokens}", _route, (tokens, 16, rule, True, 3.0), sizes)
    yield Case("large logits", _route, (20, 16, rules[0][1], False, 15.0), sizes)


def routed(g: Inputs, tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """(weights [T,k] float32, ids [T,k] int32): different experts for each token."""
    ids = g.uniform(tokens, experts).topk(top_k)[1].int()
    return g.uniform(tokens, top_k), ids


def _moe(
    g: Inputs, tokens: int, size: int, inner: int, experts: int, top_k: int, elsewhere: bool = False
) -> Arguments:
    weights, ids = routed(g, tokens, experts, top_k)
    if elsewhere:
        ids = torch.where(ids % 2 == 0, ids, -1)
    w13 = g.normal(experts, 2 * inner, size, scale=size**-0.5)
    w2 = g.normal(experts, size, inner, scale=inner**-0.5)
    unused = [e for e in range(experts) if not (ids == e).any()]
    w13[unused], w2[unused] = NAN, NAN
    return g.inside(g.normal(tokens, size)), w13, w2, weights, ids


def _one_expert(g: Inputs) -> Arguments:
    """Every token chose the same expert, and nothing else."""
    x, w13, w2, weights, ids = _moe(g, 40, 64, 32, 4, 1)
    return x, g.normal(*w13.shape, scale=0.1), g.normal(*w2.shape, scale=0.1), weights, ids * 0 + 2


def _plus(g: Inputs, tokens: int) -> Arguments:
    """An addend, strided, and tokens whose experts all are elsewhere."""
    x, w13, w2, weights, ids = _moe(g, tokens, 64, 32, 8, 3, True)
    ids[::3] = -1
    return x, w13, w2, weights, ids, g.inside(g.normal(tokens, 64))


def _with_addend(g: Inputs, tokens: int) -> Arguments:
    arguments = _moe(g, tokens, 64, 32, 8, 3)
    return *arguments, g.inside(g.normal(tokens, 64))


def _moe_shapes(size: int, inner: int, experts: int) -> dict[str, int]:
    return {"num_experts": experts, "hidden_size": size, "intermediate_size": inner}


def moe_cases() -> Iterator[Case]:
    for tokens, size, inner, experts, top_k in (
        (0, 64, 32, 4, 2),
        (1, 64, 32, 4, 2),
        (8, 128, 96, 16, 4),
        (3, 37, 19, 5, 5),
        (150, 64, 70, 3, 2),
        (300, 33, 130, 2, 1),
        (2, 256, 128, 64, 8),
    ):
        name = f"T={tokens} {size}x{inner} {top_k} of {experts}"
        shapes = _moe_shapes(size, inner, experts)
        yield Case(name, _moe, (tokens, size, inner, experts, top_k), shapes)
    shapes = _moe_shapes(64, 32, 8)
    for tokens in (1, 40):
        yield Case(f"T={tokens}, half elsewhere", _moe, (tokens, 64, 32, 8, 3, True), shapes)
        yield Case(f"T={tokens}, plus an addend", _plus, (tokens,), shapes)
    for tokens in (0, 1, 40):
        yield Case(f"T={tokens}, with an addend", _with_addend, (tokens,), shapes)
    yield Case("all to one expert", _one_expert, (), _moe_shapes(64, 32, 4))


def _silu_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _silu(g, tokens, shapes["size"], 1.0)


def _route_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    experts = shapes["num_experts"]
    groups = 8 if experts % 8 == 0 else 1
    rule = (min(8, experts // 2), "sigmoid", groups, max(groups // 2, 1), "top2", True, 2.5)
    return _route(g, tokens, experts, rule, True, 1.0)


def _moe_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    experts = shapes["num_experts"]
    sizes = (
        shapes["hidden_size"],
        shapes["intermediate_size"],
        experts,
        max(1, min(8, experts // 4)),
    )
    return _moe(g, tokens, *sizes)


def _silu_work(arguments: Arguments) -> Work:
    (x,) = arguments
    return Work(1.5 * x.numel() * x.element_size(), 4.0 * x.numel())


def _route_work(arguments: Arguments) -> Work:
    return Work(float(arguments[0].nbytes), 4.0 * arguments[0].numel())


def _moe_work(arguments: Arguments) -> Work:
    _, w13, w2, _, ids = arguments[:5]
    each = w13[0].numel() + w2[0].numel()
    used = len(torch.unique(ids[ids >= 0]))
    return Work(float(used * each * w13.element_size()), 2.0 * int((ids >= 0).sum()) * each)


SILU = floats(2e-6, 8e-3, "an exponential and a division in float32")
CASES = (
    OpCases(
        "silu_mul",
        silu_mul_cases,
        SILU,
        sized=_silu_sized,
        work=_silu_work,
        examples=({"size": 512}, {"size": 3072}),
    ),
    OpCases(
        "route",
        route_cases,
        {torch.float32: Tolerance(5e-6, "exponentials in float32; ids are exact, ties included")},
        sized=_route_sized,
        work=_route_work,
        examples=({"num_experts": 16}, {"num_experts": 256}),
    ),
    OpCases(
        "moe",
        moe_cases,
        floats(5e-6, 1.5e-2, "two float32 sums of products, the inner result rounded"),
        weights=(1, 2),
        sized=_moe_sized,
        work=_moe_work,
        examples=(_moe_shapes(1024, 512, 16),),
    ),
)
