# SPDX-License-Identifier: MIT
"""Cases of latent attention in its materialised form, and of states that are merged."""

from collections.abc import Iterator, Mapping

import torch

from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Tolerance, Work, floats
from tokenspeed.kernels.cases.ragged import INF, ragged, starts

Rows = tuple[tuple[int, int], ...]  # (queries, keys)
MIXED: Rows = ((1, 1), (5, 40), (64, 64), (3, 200), (17, 17))


def _ragged(
    g: Inputs,
    rows: Rows,
    heads: tuple[int, int],
    dims: tuple[int, int],
    causal: bool,
    tail: int = 0,
) -> Arguments:
    """Keys and values are halves of one projection, as they come from a latent."""
    queries, keys = (starts([row[at] for row in rows]) for at in (0, 1))
    num_q, num_k = int(queries[-1]), int(keys[-1])
    both = g.normal(num_k, heads[1], sum(dims))
    q = g.inside(g.normal(num_q, heads[0], dims[0]))
    tails = (g.normal(num_q, heads[0], tail), g.normal(num_k, tail)) if tail else ()
    scale = (dims[0] + tail) ** -0.5
    k, v = both[..., : dims[0]], both[..., dims[0] :]
    return q, k, v, queries, keys, scale, causal, *tails


def ragged_cases() -> Iterator[Case]:
    for heads, dims, tail in (
        ((4, 4), (64, 64), 0),
        ((4, 2), (40, 24), 0),
        ((2, 2), (192, 128), 0),
        ((3, 3), (128, 128), 64),
    ):
        sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": dims[0] + tail}
        sizes |= {"value_dim": dims[1], "tail_dim": tail}
        for causal in (True, False):
            name = f"{heads[0]}/{heads[1]}x{dims[0]}+{tail}/{dims[1]}{', causal' if causal else ''}"
            yield Case(name, _ragged, (MIXED, heads, dims, causal, tail), sizes)
    sizes = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "value_dim": 64, "tail_dim": 0}
    some = ((4, 4), (64, 64))
    yield Case("no rows", _ragged, ((), *some, True), sizes)
    yield Case("rows without keys", _ragged, (((2, 0), (3, 9), (1, 0)), *some, False), sizes)
    yield Case("more queries than keys", _ragged, (((9, 4), (2, 2)), *some, True), sizes)
    yield Case("rows without queries", _ragged, (((0, 5), (3, 9), (0, 0)), *some, True), sizes)
    yield Case("2,000 keys", _ragged, (((130, 2000),), *some, True), sizes)


def _states(g: Inputs, tokens: int, heads: int, dim: int, spread: float) -> Arguments:
    lse = [g.normal(tokens, heads, scale=spread, dtype=torch.float32) for _ in range(2)]
    return g.normal(tokens, heads, dim), lse[0], g.normal(tokens, heads, dim), lse[1]


def _half_empty(g: Inputs) -> Arguments:
    a, lse_a, b, lse_b = _states(g, 6, 3, 16, 2.0)
    lse_a[0], lse_a[2], lse_b[1], lse_b[2] = -INF, -INF, -INF, -INF
    a[0], a[2], b[1], b[2] = 0.0, 0.0, 0.0, 0.0
    return a, lse_a, b, lse_b


def merge_cases() -> Iterator[Case]:
    for tokens, heads, dim in ((0, 2, 8), (1, 1, 1), (5, 16, 128), (40, 3, 36)):
        sizes = {"num_heads": heads, "head_dim": dim}
        for spread in (1.0, 80.0):
            name = f"T={tokens} {heads}x{dim}, lse of {spread:g}"
            yield Case(name, _states, (tokens, heads, dim, spread), sizes)
    yield Case("sides without keys", _half_empty, (), {"num_heads": 3, "head_dim": 16})


def _gather(g: Inputs, rows: tuple[tuple[int, int, int], ...], size: int) -> Arguments:
    """rows: (first, last, length of the sequence)."""
    batch = ragged([(1, length) for _, _, length in rows], 16)
    cache = batch.cache(size, dtype=g.dtype)
    first = torch.tensor([begin for begin, _, _ in rows], dtype=torch.int32)
    bounds = starts([end - begin for begin, end, _ in rows])
    return cache, batch.page_table, batch.slots, first, bounds, int(bounds[-1]), g.dtype


def gather_cases() -> Iterator[Case]:
    for size in (40, 576):
        for name, rows in (
            ("mixed", ((0, 50, 50), (16, 32, 40), (3, 4, 5), (7, 7, 9), (0, 1, 1))),
            ("no rows", ()),
        ):
            yield Case(f"{name}, {size}", _gather, (rows, size), {"size": size})


def _ragged_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    heads = shapes["num_heads"], shapes["num_kv_heads"]
    tail = shapes.get("tail_dim", 0)
    dims = shapes["head_dim"] - tail, shapes["value_dim"]
    return _ragged(g, ((tokens, 2048 + tokens),), heads, dims, True, tail)


def _ragged_work(arguments: Arguments) -> Work:
    q, k, v = arguments[:3]
    pairs = len(q) * (len(k) - len(q) / 2)
    features = q.shape[2] + v.shape[2] + (arguments[7].shape[2] if len(arguments) > 7 else 0)
    moved = (k.numel() + v.numel()) * k.element_size()
    return Work(float(moved), 2.0 * pairs * q.shape[1] * features)


# As `layers/attention_mla.py` asks for it, 16 heads of DeepSeek V3.
DEEPSEEK = {"num_heads": 16, "num_kv_heads": 16, "head_dim": 192, "value_dim": 128, "tail_dim": 64}
STATE = floats(5e-6, 1.5e-2, "float32 sums and exponentials", least=1.0)
CASES = (
    OpCases(
        "attention_ragged",
        ragged_cases,
        STATE,
        sized=_ragged_sized,
        work=_ragged_work,
        examples=(
            {
                "num_heads": 16,
                "num_kv_heads": 16,
                "head_dim": 192,
                "value_dim": 128,
                "tail_dim": 64,
            },
        ),
    ),
    OpCases("merge_state", merge_cases, STATE),
    OpCases(
        "gather_latent",
        gather_cases,
        {d: Tolerance(1e-9, "rows are copied") for d in (torch.float32, torch.bfloat16)},
    ),
)
