# SPDX-License-Identifier: MIT
"""Cases of rows of a table by id, and of sums. Ids outside of the table's slice give zeros."""

from collections.abc import Iterator, Mapping

import torch

from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Tolerance, Work, floats

EXACT = "rows are copied"


def _embedding(g: Inputs, tokens: int, vocab: int, size: int, first: int, beyond: int) -> Arguments:
    ids = g.integers(max(first - beyond, 0), first + vocab + beyond, tokens)
    return ids, g.normal(vocab, size), first


def embedding_cases() -> Iterator[Case]:
    for tokens in (0, 1, 70):
        for vocab, size in ((1, 1), (100, 33), (512, 1024)):
            name = f"T={tokens} {vocab}x{size}"
            yield Case(name, _embedding, (tokens, vocab, size, 0, 0), {"size": size})
    yield Case("a slice", _embedding, (70, 40, 64, 80, 50), {"size": 64})
    yield Case("ids beyond", _embedding, (70, 40, 64, 0, 50), {"size": 64})


def _add(g: Inputs, tokens: int, size: int, scale: float) -> Arguments:
    return g.inside(g.normal(tokens, size, scale=scale)), g.inside(g.normal(tokens, size))


def add_cases() -> Iterator[Case]:
    for tokens, size in ((0, 8), (1, 1), (5, 33), (70, 1024)):
        yield Case(f"T={tokens} {size}", _add, (tokens, size, 1.0), {"size": size})
    for scale in (1e-30, 1e30):
        yield Case(f"summands of {scale:g}", _add, (3, 64, scale), {"size": 64})


def _add_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return g.normal(tokens, shapes["size"]), g.normal(tokens, shapes["size"])


def _add_work(arguments: Arguments) -> Work:
    x, _ = arguments
    return Work(3.0 * x.numel() * x.element_size(), float(x.numel()))


def _sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _embedding(g, tokens, 32768, shapes["size"], 0, 0)


def _work(arguments: Arguments) -> Work:
    ids, weight, _ = arguments
    return Work(2.0 * len(ids) * weight[0].nbytes, 0.0)


CASES = (
    OpCases(
        "embedding",
        embedding_cases,
        {dtype: Tolerance(1e-9, EXACT) for dtype in (torch.float32, torch.bfloat16)},
        sized=_sized,
        work=_work,
        examples=({"size": 1024},),
    ),
    OpCases(
        "add",
        add_cases,
        floats(1e-7, 4e-3, "one rounding"),
        sized=_add_sized,
        work=_add_work,
        examples=({"size": 1024},),
    ),
)
