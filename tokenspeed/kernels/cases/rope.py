# SPDX-License-Identifier: MIT
"""Cases of rotary embedding with the append to the cache. Rows that nobody writes must stay."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Tolerance, Work, floats
from tokenspeed.kernels.cases.ragged import NAN
from tokenspeed.kernels.kv_fp8 import ROW_BYTES, unpack_fp8

FLOAT8 = Tolerance(8e-2, "a code of float8 may be rounded the other way")
ROUNDED = Tolerance(4e-3, "a bfloat16 cache keeps 8 bits")
LAST_POSITION = 131_071


def table(positions: int, rot: int) -> Tensor:
    """[positions, rot] float32: cos of rot / 2 angles, then sin."""
    exponents = torch.arange(0, rot, 2, dtype=torch.float64) / rot
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), 10000.0**-exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def _places(g: Inputs, tokens: int, positions: int, pages: int) -> tuple[Tensor, Tensor]:
    """Positions and cache rows: scattered, the last position of the table among them."""
    where = g.integers(0, positions, tokens, dtype=torch.int32)
    where[:1] = positions - 1
    return where, g.some_of(pages * 16, tokens)


def _gqa(
    g: Inputs,
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    rot: int,
    interleaved: bool,
    other_cache: bool = False,
    positions: int = 99,
) -> Arguments:
    (num_heads, kv_heads), (dim, value_dim), pages = heads, dims, tokens // 16 + 2
    sizes = [num_heads * dim, kv_heads * dim, kv_heads * value_dim]
    q, k, v = torch.split(g.normal(tokens, sum(sizes)), sizes, dim=-1)
    dtypes = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
    held = dtypes.get(g.dtype, g.dtype) if other_cache else g.dtype
    caches = [torch.full((pages, 16, kv_heads, d), NAN, dtype=held) for d in (dim, value_dim)]
    return (
        q.view(tokens, num_heads, dim),
        k.view(tokens, kv_heads, dim),
        v.view(tokens, kv_heads, value_dim),
        table(positions, rot),
        *_places(g, tokens, positions, pages),
        *caches,
        interleaved,
    )


def gqa_cases() -> Iterator[Case]:
    for heads, dims, rot in (
        ((4, 2), (64, 64), 64),
        ((7, 7), (24, 10), 6),
        ((1, 1), (128, 128), 64),
        ((16, 8), (128, 128), 128),
    ):
        sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": dims[0]}
        for interleaved in (False, True):
            pairs = "pairs" if interleaved else "halves"
            name = f"{heads[0]}/{heads[1]}x{dims[0]}/{dims[1]}, {rot} turn in {pairs}"
            yield Case(name, _gqa, (23, heads, dims, rot, interleaved), sizes)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    some = ((4, 2), (64, 64), 64, False)
    for tokens in (0, 1, 130):
        yield Case(f"T={tokens}", _gqa, (tokens, *some), sizes)
    yield Case("other dtype in the cache", _gqa, (23, *some, True), sizes, looser=ROUNDED)
    yield Case("position 131,071", _gqa, (5, *some, False, LAST_POSITION + 1), sizes)


def _mla(
    g: Inputs,
    tokens: int,
    heads: int,
    latent: int,
    rope: int,
    interleaved: bool,
    other_cache: bool = False,
) -> Arguments:
    pages = tokens // 16 + 2
    q_pe = g.inside(g.normal(tokens, heads, rope), before=12, behind=0)
    down, k_pe = torch.split(g.normal(tokens, latent + rope), [latent, rope], dim=-1)
    dtypes = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
    held = dtypes.get(g.dtype, g.dtype) if other_cache else g.dtype
    cache = torch.full((pages, 16, latent + rope), NAN, dtype=held)
    places = _places(g, tokens, 50, pages)
    return q_pe, k_pe, down, table(50, rope), *places, cache, interleaved


def _mla_float8(g: Inputs, tokens: int, heads: int) -> Arguments:
    *arguments, cache, interleaved = _mla(g, tokens, heads, 512, 64, True)
    held = torch.full((*cache.shape[:2], ROW_BYTES), 255, dtype=torch.uint8)
    return *arguments, held, interleaved


def mla_cases() -> Iterator[Case]:
    for heads, latent, rope in ((5, 36, 10), (16, 512, 64), (128, 512, 64)):
        sizes = {"num_heads": heads, "latent_dim": latent, "rope_dim": rope}
        for interleaved in (False, True):
            name = f"{heads}x{latent}+{rope} in {'pairs' if interleaved else 'halves'}"
            yield Case(name, _mla, (9, heads, latent, rope, interleaved), sizes)
    sizes = {"num_heads": 5, "latent_dim": 36, "rope_dim": 10}
    for tokens in (0, 1, 130):
        yield Case(f"T={tokens}", _mla, (tokens, 5, 36, 10, True), sizes)
    sizes8 = {"num_heads": 16, "latent_dim": 512, "rope_dim": 64, "kv_bits": 8}
    for tokens in (1, 40):
        name = f"T={tokens}, float8 cache"
        yield Case(name, _mla_float8, (tokens, 16), sizes8, looser=FLOAT8)
    yield Case("other dtype in the cache", _mla, (9, 5, 36, 10, True, True), sizes, looser=ROUNDED)


def _with_caches(places: tuple[int, ...], result: Any, arguments: Arguments) -> tuple[Tensor, ...]:
    """The turned queries, and whole caches: what was not written must still be NaN."""
    caches = (arguments[place] for place in places)
    return result, *(unpack_fp8(c) if c.dtype == torch.uint8 else c for c in caches)


def _gqa_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    heads, dim = (shapes["num_heads"], shapes["num_kv_heads"]), shapes["head_dim"]
    return _gqa(g, tokens, heads, (dim, dim), dim, False, positions=4096)


def _mla_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _mla(g, tokens, shapes["num_heads"], shapes["latent_dim"], shapes["rope_dim"], True)


def _work(count: int, arguments: Arguments) -> Work:
    """The first `count` arguments are read and written once."""
    inputs = arguments[:count]
    return Work(2.0 * sum(x.numel() * x.element_size() for x in inputs), 3.0 * inputs[0].numel())


TOLERANCE = floats(5e-7, 8e-3, "two products and a sum in float32")
CASES = (
    OpCases(
        "rope_append_gqa",
        gqa_cases,
        TOLERANCE,
        read=partial(_with_caches, (6, 7)),
        sized=_gqa_sized,
        work=partial(_work, 3),
        examples=({"num_heads": 16, "num_kv_heads": 8, "head_dim": 128},),
    ),
    OpCases(
        "rope_append_mla",
        mla_cases,
        TOLERANCE,
        read=partial(_with_caches, (6,)),
        sized=_mla_sized,
        work=partial(_work, 3),
        examples=({"num_heads": 16, "latent_dim": 512, "rope_dim": 64},),
    ),
)
