# SPDX-License-Identifier: MIT
"""Of small kernels what cases do not say: rows on their own, wrong arguments, NaN."""

import pytest
import torch
from torch import Tensor

from tokenspeed import _cpu

DTYPES = [torch.float32, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rope_table(size: int, rot: int) -> Tensor:
    angles = torch.outer(torch.arange(size), 10000 ** (-torch.arange(0, rot, 2) / rot)).float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def test_a_row_of_linear_does_not_depend_on_the_others(isa: str) -> None:
    x, weight = rand(16, 200, dtype=torch.float32), rand(33, 200, dtype=torch.float32, seed=2)
    whole = _cpu.linear(x, weight)
    for tokens in (1, 3, 8):
        assert torch.equal(_cpu.linear(x[:tokens], weight), whole[:tokens])


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    for bad in (x[0], x.double(), x.t(), torch.ones(1, 1, 1, 4)):
        with pytest.raises(ValueError, match="x"):
            _cpu.rms_norm(bad, weight, 1e-6)
    with pytest.raises(ValueError, match="weight"):
        _cpu.rms_norm(x, weight[:3], 1e-6)
    with pytest.raises(ValueError, match="weight"):
        _cpu.rms_norm(x, weight.bfloat16(), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        _cpu.add_rms_norm(x, x[:1], weight, 1e-6)
    q, caches = torch.ones(2, 1, 4), (torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4).byte())
    places = (torch.zeros(2, dtype=torch.int32), torch.arange(2))
    with pytest.raises(ValueError, match="rope_append_gqa: value_cache: its dtype differs"):
        _cpu.rope_append_gqa(q, q, q, torch.ones(2, 4), *places, *caches, False)
    with pytest.raises(ValueError, match="linear: x: has no inputs"):
        _cpu.linear(torch.ones(2, 0), torch.ones(3, 0))
    with pytest.raises(ValueError, match="x"):
        _cpu.silu_mul(x[:, :3].contiguous())
    with pytest.raises(ValueError, match="weight"):
        _cpu.linear(x, torch.ones(3, 5))
    q = torch.ones(2, 1, 4)
    cache = torch.ones(1, 16, 1, 4)
    table = rope_table(8, 4)
    good = [q, q, q, table, torch.arange(2).int(), torch.arange(2), cache, cache.clone(), False]
    _cpu.rope_append_gqa(*good)
    for place, name, bad_value in [
        (1, "k", torch.ones(3, 1, 4)),
        (3, "cos_sin", table.double()),
        (4, "positions", torch.tensor([0, 8]).int()),
        (5, "cache_index", torch.tensor([-1, 0])),
        (5, "cache_index", torch.tensor([0, 16])),
        (6, "key_cache", torch.ones(1, 16, 2, 4)),
        (7, "value_cache", torch.ones(1, 16, 1, 5)),
    ]:
        arguments: list[object] = list(good)
        arguments[place] = bad_value
        with pytest.raises(ValueError, match=name):
            _cpu.rope_append_gqa(*arguments)


def test_no_tokens_are_no_work() -> None:
    x = torch.ones(0, 8)
    assert _cpu.rms_norm(x, torch.ones(8), 1e-6).shape == (0, 8)
    assert _cpu.silu_mul(x).shape == (0, 4)
    assert _cpu.linear(x, torch.ones(3, 8)).shape == (0, 3)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    w13, w2 = _cpu.pack(torch.ones(2, 6, 8)), _cpu.pack(torch.ones(2, 8, 3))
    out = _cpu.moe(x, w13, w2, torch.ones(0, 2), ids)
    assert out.shape == (0, 8)
    caches = torch.ones(1, 16, 1, 8), torch.ones(1, 16, 1, 8)
    none = torch.zeros(0, dtype=torch.int32)
    table, start = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    q = torch.ones(0, 1, 8)
    assert _cpu.attention_gqa(q, *caches, table, none, start, none, 1.0).shape == (0, 1, 8)


def test_nan_gates_stay_nan(isa: str) -> None:
    for dtype in DTYPES:
        assert _cpu.silu_mul(torch.full((1, 4), float("nan"), dtype=dtype)).isnan().all()


def test_a_tensor_without_memory_is_refused() -> None:
    x = torch.ones(5, 16)
    x.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="silu_mul"):
        _cpu.silu_mul(x)
