# SPDX-License-Identifier: MIT
"""Cases of latent attention whose requests share leading pages, and of finding who shares them."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from tokenspeed.kernels.cases.attention import TOLERANCE, Rows
from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Tolerance, as_asked
from tokenspeed.kernels.cases.ragged import Ragged, ragged
from tokenspeed.kernels.mla_shared import prefix_groups

PAGE = 64
# (rows, shared pages with the row before)
AGENTS: Rows = ((1, 1000), (1, 1100), (4, 900), (1, 70), (1, 1200), (2, 1201))
SHARED = (0, 12, 10, 0, 0, 17)


def _batch(rows: Rows, shared: tuple[int, ...]) -> Ragged:
    """Pages that are left by who shares others' stay poisoned."""
    batch = ragged(rows, PAGE)
    table = batch.page_table.clone()
    slots = batch.slots.tolist()
    for row, pages in enumerate(shared):
        if pages:
            table[slots[row], :pages] = table[slots[row - 1], :pages]
    return replace(batch, page_table=table)


def _groups(g: Inputs, rows: Rows, shared: tuple[int, ...]) -> Arguments:
    return *_batch(rows, shared).tables(), PAGE


def _attention(g: Inputs, rows: Rows, shared: tuple[int, ...], heads: int) -> Arguments:
    batch = _batch(rows, shared)
    queries = (g.normal(batch.num_tokens, heads, size) for size in (512, 64))
    cache = batch.cache(576, dtype=g.dtype, seed=5)
    groups = prefix_groups(*batch.tables(), PAGE)
    return *queries, cache, *batch.tables(), 576**-0.5, groups


BATCHES: dict[str, tuple[Rows, tuple[int, ...]]] = {
    "agents": (AGENTS, SHARED),
    "all share": (((1, 1030),) * 4, (0, 16, 16, 16)),
    "nobody shares": (((1, 700), (1, 640)), (0, 0)),
    "less than is worth it": (((1, 700), (1, 640)), (0, 7)),
    "no rows": ((), ()),
}


def group_cases() -> Iterator[Case]:
    for name, params in BATCHES.items():
        yield Case(name, _groups, params, {"page_size": PAGE})


def attention_cases() -> Iterator[Case]:
    sizes = {"num_heads": 16, "latent_dim": 512, "rope_dim": 64, "page_size": PAGE}
    for name, params in BATCHES.items():
        yield Case(name, _attention, (*params, 16), sizes)


CASES = (
    OpCases(
        "prefix_groups",
        group_cases,
        {torch.float32: Tolerance(1e-9, "whole numbers")},
        truth=as_asked,
    ),
    OpCases("attention_mla_shared", attention_cases, TOLERANCE),
)
