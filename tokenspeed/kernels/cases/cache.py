# SPDX-License-Identifier: MIT
"""Cases of page copies: within a cache and between caches; pages that are not copied must stay."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Tolerance
from tokenspeed.kernels.cases.ragged import NAN


def _between(g: Inputs, count: int, *page: int) -> Arguments:
    source = g.normal(9, *page)
    source[4] = NAN  # nobody's page, unless it is copied
    target = torch.full((12, *page), NAN, dtype=g.dtype)
    return source, target, g.some_of(9, count), g.some_of(12, count)


def _within(g: Inputs, *page: int) -> Arguments:
    cache = g.normal(10, *page)
    pages = g.some_of(10, 8)
    return cache, cache, pages[:4], pages[4:]


def copy_cases() -> Iterator[Case]:
    for page in ((16, 2, 64), (64, 576), (1, 3)):
        for count in (0, 1, 7):
            name = f"{count} pages of {'x'.join(map(str, page))}"
            yield Case(name, _between, (count, *page), {"page_size": page[0]})
        name = f"within a cache, {'x'.join(map(str, page))}"
        yield Case(name, _within, page, {"page_size": page[0]})


def _target(result: Any, arguments: Arguments) -> tuple[Tensor, ...]:
    return (arguments[1],)


CASES = (
    OpCases(
        "copy_pages",
        copy_cases,
        {d: Tolerance(1e-9, "pages are copied") for d in (torch.float32, torch.bfloat16)},
        read=_target,
    ),
)
