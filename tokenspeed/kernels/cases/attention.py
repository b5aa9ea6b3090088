# SPDX-License-Identifier: MIT
"""Cases of attention over paged caches: ragged batches, long contexts, windows, quantised rows."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tokenspeed.kernels.cases.case import (
    Arguments,
    Case,
    Inputs,
    OpCases,
    Tolerance,
    Work,
    floats,
    in_float64,
)
from tokenspeed.kernels.cases.ragged import Ragged, ragged
from tokenspeed.kernels.kv_fp8 import ROW_BYTES, pack_fp8
from tokenspeed.kernels.kv_int8 import pack_int8

Rows = tuple[tuple[int, int], ...]  # (q_len, kv_len)
MIXED: Rows = (
    (1, 1),
    (1, 64),
    (1, 65),
    (2, 17),
    (7, 300),
    (33, 33),
    (70, 129),
    (16, 256),
    (1, 300),
)
DECODE: Rows = ((1, 1), (1, 63), (1, 64), (1, 700), (4, 513), (8, 8), (2, 129))
LONG: Rows = ((1, 1500), (3, 513), (40, 1100), (1, 512), *[(1, 700)] * 3)
HUGE: Rows = ((1, 100), (4, 131_072))
LARGE_SCORES = Tolerance(5e-5, "a score of 500 is rounded by 3e-5, the exponential by as much")
BIG_CONTEXT = 20_000  # from which the truth is computed head by head


def _gqa(
    g: Inputs,
    rows: Rows,
    page_size: int,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    other_cache: bool = False,
    window: int = 0,
    q_scale: float = 1.0,
) -> Arguments:
    batch = ragged(rows, page_size)
    held = _other(g.dtype) if other_cache else g.dtype
    q = g.normal(batch.num_tokens, heads, dim, scale=q_scale)
    keys = batch.cache(kv_heads, dim, dtype=held, seed=2)
    values = batch.cache(kv_heads, value_dim, dtype=held, seed=3)
    rest = (window,) if window else ()
    return g.inside(q.flatten(1)).view_as(q), keys, values, *batch.tables(), dim**-0.5, *rest


def _other(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def _gqa_int8(
    g: Inputs, rows: Rows, heads: int, kv_heads: int, dim: int, scale: float
) -> Arguments:
    batch = ragged(rows, 16)
    caches = [
        pack_int8(batch.cache(kv_heads, dim, dtype=torch.float32, seed=seed, scale=scale))
        for seed in (2, 3)
    ]
    return g.normal(batch.num_tokens, heads, dim), *caches, *batch.tables(), dim**-0.5 / scale


def _equal_keys(g: Inputs) -> Arguments:
    """All scores of a row are equal: the softmax is a mean."""
    q, keys, *rest = _gqa(g, DECODE, 16, 4, 2, 32, 32)
    return q, torch.where(keys.isfinite(), torch.full_like(keys, 0.25), keys), *rest


def _gqa_shapes(heads: int, kv_heads: int, dim: int, page_size: int) -> dict[str, int]:
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    return sizes | {"page_size": page_size}


def gqa_cases() -> Iterator[Case]:
    for page, heads, kv_heads, dim, value_dim in (
        (16, 4, 2, 64, 64),
        (64, 16, 8, 128, 128),
        (16, 3, 3, 192, 128),
        (64, 7, 1, 576, 512),
        (16, 5, 1, 24, 20),
        (1, 9, 3, 7, 5),
        (64, 2, 2, 40, 192),
        (16, 4, 2, 56, 64),
    ):
        sizes = _gqa_shapes(heads, kv_heads, dim, page) | {"value_dim": value_dim}
        name = f"{heads}/{kv_heads}x{dim}/{value_dim} page {page}"
        yield Case(name, _gqa, (MIXED, page, heads, kv_heads, dim, value_dim), sizes)
    sizes = _gqa_shapes(4, 2, 64, 16)
    some = (16, 4, 2, 64, 64)
    yield Case("decode", _gqa, (DECODE, *some), sizes)
    yield Case("long", _gqa, (LONG, *some), sizes)
    yield Case("no rows", _gqa, ((), *some), sizes)
    yield Case("other dtype in the cache", _gqa, (MIXED, *some, True), sizes)
    for window in (1, 15, 16, 64, 1000):
        wide = sizes | {"window": window}
        yield Case(f"window {window}", _gqa, (MIXED, *some, False, window), wide)
    params = (DECODE, *some, False, 0, 60.0)
    yield Case("scores of hundreds", _gqa, params, sizes, looser=LARGE_SCORES)
    yield Case("equal scores", _equal_keys, (), _gqa_shapes(4, 2, 32, 16))
    for scale in (1.0, 1e-6, 1e6):
        held = _gqa_shapes(4, 2, 64, 16) | {"kv_bits": 8}
        yield Case(f"int8 cache, values of {scale:g}", _gqa_int8, (DECODE, 4, 2, 64, scale), held)
    huge = _gqa_shapes(8, 1, 128, 64)
    yield Case("128K", _gqa, (HUGE, 64, 8, 1, 128, 128), huge, "full")


def _mla(
    g: Inputs,
    rows: Rows,
    page_size: int,
    heads: int,
    latent: int,
    rope: int,
    other_cache: bool = False,
) -> Arguments:
    batch = ragged(rows, page_size)
    held = _other(g.dtype) if other_cache else g.dtype
    q_latent = g.normal(batch.num_tokens, heads, latent)
    q_pe = g.inside(g.normal(batch.num_tokens, heads, rope))
    cache = batch.cache(latent + rope, dtype=held, seed=5)
    return q_latent, q_pe, cache, *batch.tables(), (latent + rope) ** -0.5


def _mla_float8(g: Inputs, rows: Rows, heads: int) -> Arguments:
    """Bytes of poison are NaN in each of a row's three formats."""
    q_latent, q_pe, cache, *rest = _mla(g, rows, 64, heads, 512, 64)
    owned = cache.isfinite().all(-1)
    held = torch.full((*owned.shape, ROW_BYTES), 255, dtype=torch.uint8)
    held[owned] = pack_fp8(*cache[owned].split((512, 64), dim=-1))
    return q_latent, q_pe, held, *rest


def _mla_shapes(heads: int, latent: int, rope: int, page_size: int) -> dict[str, int]:
    return {"num_heads": heads, "latent_dim": latent, "rope_dim": rope, "page_size": page_size}


def mla_cases() -> Iterator[Case]:
    for rows, page, heads, latent, rope in (
        (MIXED, 64, 16, 512, 64),
        (MIXED, 16, 5, 64, 16),
        (MIXED, 16, 1, 36, 10),
        (DECODE, 64, 130, 32, 8),
    ):
        sizes = _mla_shapes(heads, latent, rope, page)
        name = f"{heads}x{latent}+{rope} page {page}"
        yield Case(name, _mla, (rows, page, heads, latent, rope), sizes)
    for heads in (8, 16, 32, 64, 128):
        sizes = _mla_shapes(heads, 512, 64, 64)
        yield Case(f"decode, {heads} heads", _mla, (DECODE, 64, heads, 512, 64), sizes)
    sizes = _mla_shapes(16, 512, 64, 64)
    some = (64, 16, 512, 64)
    yield Case("long", _mla, (LONG, *some), sizes)
    yield Case("no rows", _mla, ((), *some), sizes)
    yield Case("other dtype in the cache", _mla, (DECODE, *some, True), sizes)
    for heads in (16, 64):
        held = _mla_shapes(heads, 512, 64, 64) | {"kv_bits": 8}
        yield Case(f"float8 cache, {heads} heads", _mla_float8, (DECODE, heads), held)
    yield Case("128K", _mla, (HUGE, *some), sizes, "full")


def _mla_up(g: Inputs, rows: Rows, heads: int, value_dim: int) -> Arguments:
    weight = g.normal(heads, value_dim, 512, scale=512**-0.5)
    return *_mla(g, rows, 64, heads, 512, 64), weight


def mla_up_cases() -> Iterator[Case]:
    for heads, value_dim in ((16, 128), (5, 40), (64, 128)):
        sizes = _mla_shapes(heads, 512, 64, 64) | {"value_dim": value_dim}
        yield Case(f"{heads} heads to {value_dim}", _mla_up, (DECODE, heads, value_dim), sizes)
    sizes = _mla_shapes(16, 512, 64, 64) | {"value_dim": 128}
    yield Case("no rows", _mla_up, ((), 16, 128), sizes)


def truth(reference: Callable[..., Any], arguments: Arguments) -> Any:
    """In float64; for long contexts one head at a time, or memory would not do."""
    lengths = arguments[-2] if isinstance(arguments[-1], float) else arguments[-3]
    if lengths.numel() == 0 or int(lengths.max()) < BIG_CONTEXT:
        return in_float64(reference, arguments)
    arguments = tuple(a.double() if _is_float(a) else a for a in arguments)
    count = 2 if arguments[2].ndim == 3 else 1  # of arguments that are divided into heads
    heads = [
        reference(*(a[:, head : head + 1] for a in arguments[:count]), *arguments[count:])
        for head in range(arguments[0].shape[1])
    ]
    return torch.cat(heads, dim=1), arguments


def _is_float(argument: object) -> bool:
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


def _batch(tokens: int, shapes: Mapping[str, int]) -> Ragged:
    """Decode steps of up to 64 rows; more tokens are the last of one sequence. `context` before."""
    context = shapes.get("context", 4096)
    return ragged(((1, context),) * tokens if tokens <= 64 else ((tokens, context + tokens),), 64)


def _gqa_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    batch, kv_heads, dim = _batch(tokens, shapes), shapes["num_kv_heads"], shapes["head_dim"]
    caches = [batch.cache(kv_heads, dim, dtype=g.dtype, seed=seed) for seed in (2, 3)]
    q = g.normal(batch.num_tokens, shapes["num_heads"], dim)
    return q, *caches, *batch.tables(), dim**-0.5


def _mla_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    batch, heads = _batch(tokens, shapes), shapes["num_heads"]
    latent, rope = shapes["latent_dim"], shapes["rope_dim"]
    cache = batch.cache(latent + rope, dtype=g.dtype, seed=5)
    q, pe = g.normal(batch.num_tokens, heads, latent), g.normal(batch.num_tokens, heads, rope)
    return q, pe, cache, *batch.tables(), (latent + rope) ** -0.5


def _gqa_work(arguments: Arguments) -> Work:
    q, keys, values, _, _, q_start, kv_len, _ = arguments
    token = (keys[0, 0].numel() + values[0, 0].numel()) * keys.element_size()
    pairs = q.shape[1] * (keys.shape[-1] + values.shape[-1])
    return Work(float(kv_len.sum()) * token, 2.0 * _seen(q_start, kv_len) * pairs)


def _mla_work(arguments: Arguments) -> Work:
    q, pe, cache, _, _, q_start, kv_len, _ = arguments
    pairs = q.shape[1] * (2 * q.shape[2] + pe.shape[2])
    read = float(kv_len.sum()) * cache.shape[-1] * cache.element_size()
    return Work(read, 2.0 * _seen(q_start, kv_len) * pairs)


def _seen(q_start: torch.Tensor, kv_len: torch.Tensor) -> float:
    """Pairs of a query and a key that it sees."""
    q_len = q_start.diff().double()
    return float((q_len * (kv_len - (q_len - 1) / 2)).sum())


TOLERANCE = floats(5e-6, 1.5e-2, "float32 sums of up to 128K products, an exponential", least=1e-3)
CASES = (
    OpCases(
        "attention_gqa",
        gqa_cases,
        TOLERANCE,
        truth=truth,
        sized=_gqa_sized,
        work=_gqa_work,
        examples=({"num_heads": 16, "num_kv_heads": 8, "head_dim": 128},),
    ),
    OpCases(
        "attention_mla",
        mla_cases,
        TOLERANCE,
        truth=truth,
        sized=_mla_sized,
        work=_mla_work,
        examples=({"num_heads": 16, "latent_dim": 512, "rope_dim": 64},),
    ),
    OpCases("attention_mla_up", mla_up_cases, TOLERANCE, weights=(8,), truth=truth),
)
