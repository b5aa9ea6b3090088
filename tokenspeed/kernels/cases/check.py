# SPDX-License-Identifier: MIT
"""Runs an op's cases on a backend and measures how far it is from the truth.

Memory that a kernel allocates and does not write reads as NaN, as does whatever the cases poison.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from tokenspeed.kernels.cases.case import Arguments, Case, OpCases, Tolerance
from tokenspeed.kernels.cases.catalog import cases_of
from tokenspeed.kernels.registry import REGISTRY, Ask, Backend

Truths = dict[tuple[str, str, torch.dtype], tuple[Tensor, ...]]
INFINITE = float("inf")


@dataclass
class Report:
    """One op on one backend in one dtype. `worst` is the largest error, 1 is what is tolerated."""

    op: str
    backend: str
    dtype: torch.dtype
    num_cases: int = 0
    num_refused: int = 0  # the backend does not serve their shapes
    worst: float = 0.0
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        head = f"{self.op} {self.backend} {self.dtype}: {len(self.failures)} of {self.num_cases}"
        return "\n  ".join([f"{head} cases fail", *self.failures])


def check(
    op: str,
    backend: str,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    full: bool = False,
    only: str = "",
    truths: Truths | None = None,
) -> Report:
    """Every case of the op whose name contains `only`. `ValueError`: no such op or backend.

    `truths` keeps true results for later checks of the same op on other backends.
    """
    REGISTRY.load()
    known = {b.name: b for b in REGISTRY.of(op)}
    if backend not in known:
        raise ValueError(f"{op} has no backend {backend!r}; it has {', '.join(known)}")
    cases, report = cases_of(op), Report(op, backend, dtype)
    truths = {} if truths is None else truths
    kind = torch.device(device).type
    for case in cases.cases():
        if only not in case.name or (case.level == "full" and not full):
            continue
        if known[backend].refusal(Ask(op, kind, dtype, case.shapes)) is not None:
            report.num_refused += 1
            continue
        report.num_cases += 1
        key = (op, case.name, dtype)
        if key not in truths:
            truths[key] = _true(cases, case, dtype, device)
        _check_case(cases, case, known[backend], device, report, truths[key])
    return report


def _true(
    cases: OpCases, case: Case, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, ...]:
    reference = REGISTRY.ops[cases.op].reference
    return cases.read(*cases.truth(reference, case.arguments(dtype, device)))


def _check_case(
    cases: OpCases,
    case: Case,
    backend: Backend,
    device: torch.device | str,
    report: Report,
    true: tuple[Tensor, ...],
) -> None:
    try:
        arguments = case.arguments(report.dtype, device)
        tolerance = _tolerance(cases, case, report.dtype)
        error, why = _distance(cases, tolerance, backend, arguments, true)
    except Exception as failure:  # a backend may be foreign code; what it raises is its result
        error, why = INFINITE, f"{type(failure).__name__}: {failure}"
    if error > report.worst or not report.worst_case:
        report.worst, report.worst_case = error, case.name
    if error > 1:
        report.failures.append(f"{case.name}: {why or f'{error:.3g} times the tolerance'}")


def _tolerance(cases: OpCases, case: Case, dtype: torch.dtype) -> Tolerance:
    usual, looser = cases.tolerance[dtype], case.looser
    return usual if looser is None or looser.share < usual.share else looser


def _distance(
    cases: OpCases,
    tolerance: Tolerance,
    backend: Backend,
    arguments: Arguments,
    expected: tuple[Tensor, ...],
) -> tuple[float, str]:
    """The largest error as a share of the tolerance, and what is wrong if it is no number."""
    with torch.no_grad(), poisoned_allocations():
        result = backend.kernel(*packed(cases, backend.pack, arguments))
    actual = cases.read(result, arguments)
    if len(actual) != len(expected):
        return INFINITE, f"{len(actual)} results, not {len(expected)}"
    worst = 0.0
    for found, true in zip(actual, expected, strict=True):
        error, why = distance(found, true, tolerance, cases.share_of_mistakes)
        if why:
            return INFINITE, why
        worst = max(worst, error)
    return worst, ""


def packed(cases: OpCases, pack: Callable[[Any], Any] | None, arguments: Arguments) -> Arguments:
    """The arguments with weights in the layout of the backend."""
    if pack is None:
        return arguments
    return tuple(pack(a) if at in cases.weights else a for at, a in enumerate(arguments))


def distance(
    found: Tensor, true: Tensor, tolerance: Tolerance, share_of_mistakes: float = 0.0
) -> tuple[float, str]:
    """(error as a share of the tolerance, what is wrong if it is no matter of precision)."""
    if found.shape != true.shape:
        return INFINITE, f"shape {list(found.shape)}, not {list(true.shape)}"
    if found.is_floating_point() != true.is_floating_point():
        return INFINITE, f"{found.dtype}, not {true.dtype}"
    found, true = found.detach().cpu(), true.detach().cpu()
    if not true.is_floating_point():
        return _mistakes(found, true, share_of_mistakes)
    found, true = found.double(), true.double()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        if not torch.equal(test(found), test(true)):
            wrong = int((test(found) != test(true)).sum())
            return INFINITE, f"{kind} where there is none, or none where it is due: {wrong} places"
    if found.numel() == 0:
        return 0.0, ""
    found, true = (x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for x in (found, true))
    row = true.abs().amax(-1, keepdim=True) if true.ndim else true.abs()
    error = (found - true).abs() / (tolerance.share * row.clamp(min=tolerance.least))
    return float(error.max()), ""


def _mistakes(found: Tensor, true: Tensor, allowed: float) -> tuple[float, str]:
    """Integers are equal or not; 1 is as many mistakes as are allowed."""
    wrong = int((found != true).sum())
    if wrong > allowed * true.numel():
        return INFINITE, f"{wrong} of {true.numel()} integers differ"
    return (wrong / (allowed * true.numel()) if wrong else 0.0), ""


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every tensor that torch allocates inside begins as NaN (integers: the largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings = cast(Any, torch.utils.deterministic)
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warned)
