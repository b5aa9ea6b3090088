# SPDX-License-Identifier: MIT
"""Norms, rotary embedding, cache appends, gated activation and linear against the references."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import close
from tokenspeed import _cpu
from tokenspeed.kernels import select

DTYPES = [torch.float32, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(op: str, dtype: torch.dtype, *arguments: object) -> tuple[Tensor, Tensor]:
    results = (select(op, dtype=dtype, backend=b)(*arguments) for b in ("cpu", "reference"))
    actual, expected = results
    return actual, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 128), (2, 1023), (40, 384), (3, 5, 64)])
def test_rms_norm(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = rand(*shape, dtype=dtype), rand(shape[-1], dtype=dtype, seed=2)
    close(*both("rms_norm", dtype, x, weight, 1e-6), dtype)
    wide = rand(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 3 : 3 + shape[-1]]
    close(*both("rms_norm", dtype, wide, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (33, 1000)])
def test_add_rms_norm(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=3)
    weight = rand(shape[1], dtype=dtype, seed=2)
    actual, expected = both("add_rms_norm", dtype, x, residual, weight, 1e-5)
    close(actual[0], expected[0], dtype)
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(isa: str, dtype: torch.dtype) -> None:
    for shape in [(1, 2), (3, 38), (70, 1024)]:
        close(*both("silu_mul", dtype, rand(*shape, dtype=dtype) * 4), dtype)
    extremes = torch.tensor([[-1e30, -200.0, 200.0, 1e30, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
    close(*both("silu_mul", dtype, extremes), dtype)
    assert _cpu.silu_mul(torch.full((1, 4), float("nan"), dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(isa: str, dtype: torch.dtype) -> None:
    for shape in [(1, 1), (3, 38), (70, 1024)]:
        x, y = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=2)
        assert torch.equal(*both("add", dtype, x, y))
        wide = rand(shape[0], shape[1] + 3, dtype=dtype)[:, 2:-1]
        assert torch.equal(*both("add", dtype, wide, y))
    with pytest.raises(ValueError, match=r"y: expected shape \[2, 3\]"):
        _cpu.add(torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(isa: str, dtype: torch.dtype) -> None:
    table = rand(11, 33, dtype=dtype)
    table[0] = torch.nan  # nobody asks for it
    ids = torch.tensor([5, 15, 5, 4, 16, -1, 7, 2**40])
    actual, expected = both("embedding", dtype, ids, table, 5 - 1)
    assert torch.equal(actual[[0, 1, 2, 4, 5, 6, 7]], expected[[0, 1, 2, 4, 5, 6, 7]])
    assert actual[3].isnan().all() and not actual[4:6].any()
    assert _cpu.embedding(ids[:0], table, 0).shape == (0, 33)


def rope_table(size: int, rot: int) -> Tensor:
    angles = torch.outer(torch.arange(size), 10000 ** (-torch.arange(0, rot, 2) / rot)).float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "rot"),
    [(4, 2, 64, 64, 64), (7, 7, 24, 10, 6), (1, 1, 128, 128, 64)],
)
def test_rope_append_gqa(
    isa: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    interleaved: bool,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    rot: int,
) -> None:
    tokens, pages = 23, 4
    fused = rand(tokens, (heads + kv_heads) * dim + kv_heads * value_dim, dtype=dtype)
    q, k, v = fused.split([heads * dim, kv_heads * dim, kv_heads * value_dim], dim=-1)
    positions = torch.randperm(99)[:tokens].int()
    index = torch.randperm(pages * 16)[:tokens]
    written = []
    for backend in ("cpu", "reference"):
        key_cache = torch.full((pages, 16, kv_heads, dim), float("nan"), dtype=cache_dtype)
        value_cache = torch.full((pages, 16, kv_heads, value_dim), float("nan"), dtype=cache_dtype)
        run = select("rope_append_gqa", dtype=dtype, backend=backend)
        turned = run(
            q.view(tokens, heads, dim),
            k.view(tokens, kv_heads, dim),
            v.view(tokens, kv_heads, value_dim),
            rope_table(99, rot),
            positions,
            index,
            key_cache,
            value_cache,
            interleaved,
        )
        untouched = torch.ones(pages * 16, dtype=torch.bool)
        untouched[index] = False
        assert key_cache.flatten(0, 1)[untouched].isnan().all()
        assert value_cache.flatten(0, 1)[untouched].isnan().all()
        caches = (c.flatten(0, 1)[index] for c in (key_cache, value_cache))
        written.append((turned, *caches))
    for actual, expected in zip(*written, strict=True):
        close(actual, expected, dtype if actual.dtype == dtype else torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_append_mla(
    isa: str, dtype: torch.dtype, cache_dtype: torch.dtype, interleaved: bool
) -> None:
    tokens, heads, nope, rope_dim, latent_dim = 9, 5, 12, 10, 36
    q_pe = rand(tokens, heads, nope + rope_dim, dtype=dtype)[..., nope:]
    down = rand(tokens, latent_dim + rope_dim, dtype=dtype, seed=2)
    latent, k_pe = down.split([latent_dim, rope_dim], dim=-1)
    index = torch.randperm(32)[:tokens]
    written = []
    for backend in ("cpu", "reference"):
        cache = torch.full((2, 16, latent_dim + rope_dim), float("nan"), dtype=cache_dtype)
        run = select("rope_append_mla", dtype=dtype, backend=backend)
        positions = torch.arange(tokens, dtype=torch.int32)
        table = rope_table(50, rope_dim)
        turned = run(q_pe, k_pe, latent, table, positions, index, cache, interleaved)
        assert int(cache.isnan().any(-1).sum()) == 32 - tokens
        written.append((turned, cache.flatten(0, 1)[index]))
    for actual, expected in zip(*written, strict=True):
        close(actual, expected, dtype if actual.dtype == dtype else torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16, 17, 133])
def test_linear(isa: str, dtype: torch.dtype, tokens: int) -> None:
    for size, out in [(64, 64), (1023, 5), (7, 131), (300, 70)]:
        x, weight = rand(tokens, size, dtype=dtype), rand(out, size, dtype=dtype, seed=2)
        weight = (weight.float() * size**-0.5).to(dtype)
        bias = rand(out, dtype=dtype, seed=3)
        for maybe_bias in (None, bias):
            expected = select("linear", dtype=dtype, backend="reference")(x, weight, maybe_bias)
            close(_cpu.linear(x, weight, maybe_bias), expected, dtype)
            close(select("linear", dtype=dtype)(x, weight, maybe_bias), expected, dtype)


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
