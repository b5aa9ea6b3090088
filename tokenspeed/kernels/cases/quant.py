# SPDX-License-Identifier: MIT
"""Cases of products with quantised weights: all formats, and weights that are hard to quantise."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tokenspeed.kernels.cases.case import (
    Arguments,
    Case,
    Inputs,
    OpCases,
    Tolerance,
    Work,
    as_asked,
    floats,
)
from tokenspeed.kernels.cases.moe import routed
from tokenspeed.kernels.quant import QuantFormat, QuantWeight, quantize

FORMS: tuple[tuple[QuantFormat, int], ...] = (
    ("int8", 32),
    ("int8", 128),
    ("int4", 32),
    ("int4", 128),
    ("fp8", 128),
    ("mxfp4", 32),
    ("nvfp4", 16),
)


def _linear(
    g: Inputs, form: QuantFormat, group: int, tokens: int, inputs: int, outputs: int, biased: bool
) -> Arguments:
    weight = g.normal(outputs, inputs, scale=inputs**-0.5, dtype=torch.float32)
    bias = g.normal(outputs) if biased else None
    return g.inside(g.normal(tokens, inputs)), quantize(weight, form, group), bias


def _extremes(g: Inputs, form: QuantFormat, group: int) -> Arguments:
    """Rows of zeros, a value far above its group, a group at both ends of its range."""
    weight = g.normal(12, 256, dtype=torch.float32)
    weight[0] = 0.0
    weight[1, 128:] = 0.0
    weight[2, 77] = 1e4
    weight[3, ::2], weight[3, 1::2] = 3.0, -3.0
    weight[4] *= 1e-20
    x = g.normal(7, 256)
    x[:, 77] = 2.0  # where the large value is met: rounding x elsewhere would drown what it gives
    x[1] = 0.0
    x[2, 200] = 1000.0
    return x, quantize(weight, form, group), None


def _shapes(inputs: int, outputs: int, group: int) -> dict[str, int]:
    return {"num_inputs": inputs, "num_outputs": outputs, "group": group}


def linear_cases() -> Iterator[Case]:
    for form, group in FORMS:
        for tokens in (0, 1, 3, 16, 70):
            for inputs, outputs in ((256, 96), (384, 7), (1024, 160)):
                name = f"{form}/{group} T={tokens} {inputs}->{outputs}"
                params = (form, group, tokens, inputs, outputs, tokens == 3)
                yield Case(name, _linear, params, _shapes(inputs, outputs, group))
        yield Case(f"{form}/{group} extremes", _extremes, (form, group), _shapes(256, 12, group))


def _moe(
    g: Inputs, form: QuantFormat, group: int, tokens: int, size: int, inner: int, experts: int
) -> Arguments:
    weights, ids = routed(g, tokens, experts, 2)
    w13 = g.normal(experts, 2 * inner, size, scale=size**-0.5, dtype=torch.float32)
    w2 = g.normal(experts, size, inner, scale=inner**-0.5, dtype=torch.float32)
    x = g.inside(g.normal(tokens, size))
    return x, quantize(w13, form, group), quantize(w2, form, group), weights, ids


def _moe_shapes(size: int, inner: int, experts: int, group: int) -> dict[str, int]:
    shapes = {"num_experts": experts, "hidden_size": size, "intermediate_size": inner}
    return shapes | {"group": group}


def moe_cases() -> Iterator[Case]:
    for form, group in FORMS:
        for tokens in (0, 1, 5, 40):
            params = (form, group, tokens, 256, 128, 4)
            shapes = _moe_shapes(256, 128, 4, group)
            yield Case(f"{form}/{group} T={tokens} 256x128 2 of 4", _moe, params, shapes)


def _weights(g: Inputs, bits: int, group: int, *shape: int) -> Arguments:
    weight = g.normal(*shape)
    weight.view(-1, shape[-1])[0] = 0.0
    return weight, bits, group


def quantize_cases() -> Iterator[Case]:
    for bits in (4, 8):
        for group in (32, 128):
            for shape in ((8, 256), (3, 5, 128)):
                name = f"int{bits}/{group} {'x'.join(map(str, shape))}"
                yield Case(name, _weights, (bits, group, *shape), {"group": group})


def _work(x: Tensor, *weights: QuantWeight) -> Work:
    held = sum(w.codes.nbytes + w.scales.nbytes for w in weights)
    count = sum(torch.Size(w.shape).numel() for w in weights)
    return Work(float(held), 2.0 * len(x) * count)


def _moe_work(arguments: Arguments) -> Work:
    """Experts that nobody chose are not read."""
    x, w13, w2, _, ids = arguments
    each = _work(x, w13, w2)
    used, of_all = len(torch.unique(ids)), w13.shape[0]
    return Work(each.bytes * used / of_all, each.flops * ids.shape[1] / of_all)


def _linear_work(arguments: Arguments) -> Work:
    return _work(arguments[0], arguments[1])


def _linear_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    """An ask does not name the format; int8 is measured."""
    sizes = tokens, shapes["num_inputs"], shapes["num_outputs"], False
    return _linear(g, "int8", shapes["group"], *sizes)


def _moe_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    sizes = (shapes[n] for n in ("hidden_size", "intermediate_size", "num_experts"))
    return _moe(g, "int8", shapes["group"], tokens, *sizes)


CASES = (
    OpCases(
        "linear_quant",
        linear_cases,
        floats(2.5e-2, 2.5e-2, "backends may hold x as int8 too, group by group"),
        weights=(1,),
        sized=_linear_sized,
        work=_linear_work,
        examples=(_shapes(1024, 4096, 32), _shapes(3072, 1024, 32)),
    ),
    OpCases(
        "moe_quant",
        moe_cases,
        floats(4e-2, 4e-2, "backends may hold x and the inner rows as int8, group by group"),
        weights=(1, 2),
        sized=_moe_sized,
        work=_moe_work,
        examples=(_moe_shapes(1024, 512, 16, 32),),
    ),
    OpCases(
        "quantize",
        quantize_cases,
        {
            dtype: Tolerance(1e-6, "scales are the reference's, and codes but for ties of rounding")
            for dtype in (torch.float32, torch.bfloat16)
        },
        truth=as_asked,
        share_of_mistakes=1e-2,
    ),
)
