# SPDX-License-Identifier: MIT
"""All ops' cases by name. A family's module is found by itself and has `CASES`."""

import importlib
import pkgutil
from functools import cache

from tokenspeed.kernels.cases.case import OpCases

FRAME = ("case", "catalog", "check", "ragged")  # modules that are no family


@cache
def all_cases() -> dict[str, OpCases]:
    """op -> its cases."""
    package = importlib.import_module("tokenspeed.kernels.cases")
    found: dict[str, OpCases] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in FRAME:
            family = importlib.import_module(f"tokenspeed.kernels.cases.{module.name}")
            found |= {cases.op: cases for cases in family.CASES}
    return found


def cases_of(op: str) -> OpCases:
    """`ValueError`: the op has none."""
    if op not in all_cases():
        raise ValueError(f"op {op!r} has no cases; known: {', '.join(sorted(all_cases()))}")
    return all_cases()[op]
