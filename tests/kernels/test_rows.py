# SPDX-License-Identifier: MIT
"""Ops that work on a token by itself: 1 to 80 rows together give each row's own bits."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention_kinds import rand
from tokenspeed import _cpu
from tokenspeed.kernels.quant import QuantFormat, quantize

MOST = 80
COUNTS = [*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80]
Op = Callable[[slice], tuple[Tensor, ...]]


def one_linear(x: Tensor, weight: _cpu.PackedWeight, at: slice) -> tuple[Tensor, ...]:
    return (_cpu.linear(x[at], weight, None),)


def linears(dtype: torch.dtype) -> dict[str, Op]:
    x, weight = rand(MOST, 320, dtype=dtype), rand(70, 320, dtype=dtype, seed=2)
    packed = _cpu.pack(weight)
    made: dict[str, Op] = {}
    made["as it stands"] = lambda at: (_cpu.linear(x[at], weight, None),)
    made["packed"] = partial(one_linear, x, packed)
    forms: list[tuple[QuantFormat, int]] = [("int8", 8), ("int4", 4)]
    for form, bits in forms:
        held = quantize(weight, form)
        codes = _cpu.pack_codes(held.codes, held.scales, bits, held.group)
        made[form] = partial(one_linear, x, codes)
    heads, each = rand(MOST, 3, 96, dtype=dtype, seed=3), rand(3, 40, 96, dtype=dtype, seed=4)
    made["heads"] = lambda at: (_cpu.head_linear(heads[at], each),)
    return made


def small_ops(dtype: torch.dtype) -> dict[str, Op]:
    x, other = rand(MOST, 200, dtype=dtype), rand(MOST, 200, dtype=dtype, seed=2)
    weight = rand(200, dtype=dtype, seed=3)
    q = rand(MOST, 4, 32, dtype=dtype, seed=4)
    k, v = (rand(MOST, 2, 32, dtype=dtype, seed=seed) for seed in (5, 6))
    angles, places = rand(90, 32, dtype=torch.float32), torch.arange(MOST)

    def rope(at: slice) -> tuple[Tensor, ...]:
        keys, values = (torch.zeros(MOST, 1, h.shape[1], 32, dtype=dtype) for h in (k, v))
        own = (q[at], k[at], v[at], angles, places[at].int() + 5, places[at])
        return _cpu.rope_append_gqa(*own, keys, values, False), keys[at], values[at]

    return {
        "rms_norm": lambda at: (_cpu.rms_norm(x[at], weight, 1e-6),),
        "add_rms_norm": lambda at: _cpu.add_rms_norm(x[at], other[at], weight, 1e-6),
        "silu_mul": lambda at: (_cpu.silu_mul(x[at]),),
        "rope": rope,
    }


def routed(dtype: torch.dtype) -> dict[str, Op]:
    logits, bias = rand(MOST, 16, dtype=torch.float32), rand(16, dtype=torch.float32, seed=2)
    x = rand(MOST, 64, dtype=dtype, seed=3)
    w13, w2 = rand(16, 96, 64, dtype=dtype, seed=4), rand(16, 64, 48, dtype=dtype, seed=5)
    packed = _cpu.pack(w13), _cpu.pack(w2)

    def route(at: slice) -> tuple[Tensor, ...]:
        return _cpu.route(logits[at], bias, 4, "sigmoid", 4, 2, "top2", True, 2.5)

    weights, ids = route(slice(None))
    return {
        "route": route,
        "moe": lambda at: (_cpu.moe(x[at], *packed, weights[at], ids[at], x[at]),),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ops", [linears, small_ops, routed])
def test_rows_stand_alone(
    isa: str, ops: Callable[[torch.dtype], dict[str, Op]], dtype: torch.dtype
) -> None:
    for name, run in ops(dtype).items():
        alone = [run(slice(i, i + 1)) for i in range(MOST)]
        for count in COUNTS:
            at = slice(MOST - count, MOST)
            for found, rows in zip(run(at), zip(*alone[at], strict=True), strict=True):
                assert torch.equal(found, torch.cat(rows)), (name, count)
