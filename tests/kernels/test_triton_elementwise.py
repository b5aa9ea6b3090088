# SPDX-License-Identifier: MIT
"""Triton's norms, rotary embedding and cache appends against the references."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import close
from tokenspeed.kernels import select
from tokenspeed.kernels.kv_fp8 import ROW_BYTES, pack_fp8, unpack_fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def both(op: str, dtype: torch.dtype, *arguments: object) -> tuple[Tensor, Tensor]:
    results = (
        select(op, device=DEVICE, dtype=dtype, backend=b)(*arguments)
        for b in ("triton", "reference")
    )
    actual, expected = results
    return actual, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 128), (2, 1023), (9, 384), (3, 5, 64)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = rand(*shape, dtype=dtype), rand(shape[-1], dtype=dtype, seed=2)
    close(*both("rms_norm", dtype, x, weight, 1e-6), dtype)
    wide = rand(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 3 : 3 + shape[-1]]
    close(*both("rms_norm", dtype, wide, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (3, 2048), (2, 7168)])
def test_add_rms_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=3)
    weight = rand(shape[1], dtype=dtype, seed=2)
    actual, expected = both("add_rms_norm", dtype, x, residual, weight, 1e-5)
    close(actual[0], expected[0], dtype)
    assert torch.equal(actual[1], expected[1])


def test_norms_of_nothing_and_of_extremes() -> None:
    weight = torch.ones(64, device=DEVICE)
    actual, expected = both(
        "rms_norm", torch.float32, torch.empty(0, 64, device=DEVICE), weight, 1e-6
    )
    assert actual.shape == expected.shape
    x = rand(3, 64, dtype=torch.float32) * torch.tensor([[1e-30], [0.0], [1e18]], device=DEVICE)
    close(*both("rms_norm", torch.float32, x, weight, 1e-6), torch.float32)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("rms_norm", (torch.ones(2, 8)[:, ::2], torch.ones(4), 1e-6), "rows of x"),
        ("rms_norm", (torch.ones(2, 8), torch.ones(4), 1e-6), "weight"),
        ("add_rms_norm", (torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), 1e-6), "residual"),
    ],
)
def test_wrong_norms_are_named(op: str, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(op, device=DEVICE, backend="triton")(*arguments)


def rope_table(size: int, rot: int) -> Tensor:
    angles = torch.outer(torch.arange(size), 10000 ** (-torch.arange(0, rot, 2) / rot)).float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(DEVICE)


def places(tokens: int, pages: int) -> tuple[Tensor, Tensor]:
    """Positions and cache indices of so many tokens."""
    generator = torch.Generator().manual_seed(7)
    positions = torch.randperm(99, generator=generator)[:tokens].int()
    return positions.to(DEVICE), torch.randperm(pages * 16, generator=generator)[:tokens].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "rot"),
    [(4, 2, 64, 64, 64), (17, 9, 24, 10, 6), (1, 1, 128, 128, 64)],
)
def test_rope_append_gqa(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    interleaved: bool,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    rot: int,
) -> None:
    tokens, pages = 7, 2
    fused = rand(tokens, (heads + kv_heads) * dim + kv_heads * value_dim, dtype=dtype)
    q, k, v = fused.split([heads * dim, kv_heads * dim, kv_heads * value_dim], dim=-1)
    positions, index = places(tokens, pages)
    written = []
    for backend in ("triton", "reference"):
        caches = [
            torch.full((pages, 16, kv_heads, size), float("nan"), dtype=cache_dtype, device=DEVICE)
            for size in (dim, value_dim)
        ]
        run = select("rope_append_gqa", device=DEVICE, dtype=dtype, backend=backend)
        turned = run(
            q.view(tokens, heads, dim),
            k.view(tokens, kv_heads, dim),
            v.view(tokens, kv_heads, value_dim),
            rope_table(99, rot),
            positions,
            index,
            *caches,
            interleaved,
        )
        written.append((turned, *caches))
    for actual, expected in zip(*written, strict=True):
        touched = ~expected.isnan()
        assert torch.equal(actual.isnan(), ~touched)
        kind = dtype if actual.dtype == dtype else torch.bfloat16
        close(actual[touched], expected[touched], kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_append_mla(dtype: torch.dtype, cache_dtype: torch.dtype, interleaved: bool) -> None:
    tokens, heads, nope, rope_dim, latent_dim = 9, 5, 12, 10, 36
    q_pe = rand(tokens, heads, nope + rope_dim, dtype=dtype)[..., nope:]
    down = rand(tokens, latent_dim + rope_dim, dtype=dtype, seed=2)
    latent, k_pe = down.split([latent_dim, rope_dim], dim=-1)
    positions, index = places(tokens, 2)
    written = []
    for backend in ("triton", "reference"):
        shape = (2, 16, latent_dim + rope_dim)
        cache = torch.full(shape, float("nan"), dtype=cache_dtype, device=DEVICE)
        run = select("rope_append_mla", device=DEVICE, dtype=dtype, backend=backend)
        table = rope_table(99, rope_dim)
        turned = run(q_pe, k_pe, latent, table, positions, index, cache, interleaved)
        written.append((turned, cache))
    close(written[0][0], written[1][0], dtype)
    touched = ~written[1][1].isnan()
    assert torch.equal(written[0][1].isnan(), ~touched)
    kind = dtype if cache_dtype == dtype else torch.bfloat16
    close(written[0][1][touched], written[1][1][touched], kind)


def test_padding_tokens_write_nothing() -> None:
    q, k = rand(3, 4, 16, dtype=torch.float32), rand(3, 2, 16, dtype=torch.float32, seed=2)
    index = torch.tensor([5, -1, 7], device=DEVICE)
    caches = [torch.full((1, 16, 2, 16), float("nan"), device=DEVICE) for _ in range(2)]
    positions, _ = places(3, 1)
    run = select("rope_append_gqa", device=DEVICE, backend="triton")
    run(q, k, k, rope_table(99, 16), positions, index, *caches, False)
    for cache in caches:
        written = ~cache[0].isnan().flatten(1).any(1)
        assert written.nonzero().flatten().tolist() == [5, 7]
    q, k_pe = (rand(3, *heads, 64, dtype=torch.float32) for heads in ((4,), ()))
    latent = rand(3, 512, dtype=torch.float32)
    plain = torch.full((1, 16, 576), float("nan"), device=DEVICE)
    codes = torch.full((1, 16, ROW_BYTES), 77, dtype=torch.uint8, device=DEVICE)
    run = select("rope_append_mla", device=DEVICE, backend="triton")
    for cache in (plain, codes):
        before = cache.clone()
        run(q, k_pe, latent, rope_table(99, 64), positions, index, cache, True)
        changed = (cache != before) & ~(cache.isnan() & before.isnan())
        assert changed[0].any(1).nonzero().flatten().tolist() == [5, 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_latents(dtype: torch.dtype) -> None:
    """The bytes that torch's own rounding gives, for groups of every size and a group of zeros."""
    tokens, heads, rope_dim, latent_dim = 6, 3, 64, 512
    sizes = torch.tensor([1.0, 1e-3, 300.0, 1e-20], device=DEVICE).repeat_interleave(128)
    latent = (rand(tokens, latent_dim, dtype=torch.float32) * sizes).to(dtype)
    latent[2, :128] = 0
    latent[3] = torch.linspace(-448, 448, 512, device=DEVICE).to(dtype)
    q_pe, k_pe = (
        rand(tokens, heads, rope_dim, dtype=dtype),
        rand(tokens, rope_dim, dtype=dtype, seed=3),
    )
    positions, index = places(tokens, 1)
    cache = torch.full((1, 16, ROW_BYTES), 255, dtype=torch.uint8, device=DEVICE)
    run = select("rope_append_mla", device=DEVICE, dtype=dtype, backend="triton")
    run(q_pe, k_pe, latent, rope_table(99, rope_dim), positions, index, cache, True)
    plain = torch.empty(1, 16, latent_dim + rope_dim, dtype=dtype, device=DEVICE)
    reference = select("rope_append_mla", device=DEVICE, dtype=dtype, backend="reference")
    reference(q_pe, k_pe, latent, rope_table(99, rope_dim), positions, index, plain, True)
    rows, turned = cache[0, index], plain[0, index, latent_dim:]
    expected = pack_fp8(latent, turned)
    assert rows.shape[1] == 656
    if dtype == torch.bfloat16:
        assert torch.equal(rows, expected)
    close(unpack_fp8(rows), unpack_fp8(expected), torch.bfloat16)
    latent[1, 200], latent[4, 300] = float("nan"), float("inf")
    run(q_pe, k_pe, latent, rope_table(99, rope_dim), positions, index, cache, True)
    lost = unpack_fp8(cache[0, index]).isnan()
    assert lost[1, 128:256].all()
    assert lost[4, 256:384].all()
    assert int(lost.sum()) == 256
    assert (cache[0, [i for i in range(16) if i not in index.tolist()]] == 255).all()
