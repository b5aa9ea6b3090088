# SPDX-License-Identifier: MIT
"""All ops, backends of this machine, dtypes and instruction sets against the float64 references.

Memory that must not be read is poison, and so is what a kernel allocates and does not write.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenspeed import _cpu
from tokenspeed.kernels.cases import Case, Inputs, OpCases, Tolerance, all_cases, cases_of, check
from tokenspeed.kernels.cases.case import moved
from tokenspeed.kernels.cases.check import Truths, distance, poisoned_allocations
from tokenspeed.kernels.plugins import GPU_BACKENDS
from tokenspeed.kernels.registry import REGISTRY

LONG = ("attention_gqa", "attention_mla")


def kernels_here() -> Iterator[tuple[str, str, str, str]]:
    """(op, dtype, backend, instruction set); all of one op and dtype in a row."""
    REGISTRY.load(gpu=False)
    for op, cases in sorted(all_cases().items()):
        for dtype in cases.tolerance if op in REGISTRY.ops else ():
            for backend in REGISTRY.of(op):
                serves = backend.dtypes is None or dtype in backend.dtypes
                if serves and backend.name not in GPU_BACKENDS:
                    for isa in _cpu.available_isas() if backend.name == "cpu" else ["any"]:
                        yield op, str(dtype).removeprefix("torch."), backend.name, isa


@pytest.fixture(scope="module")
def truths() -> Truths:
    """Of the op and dtype that the last tests were about."""
    return {}


@pytest.mark.parametrize(("op", "type_name", "backend", "isa"), list(kernels_here()))
def test_every_case(op: str, type_name: str, backend: str, isa: str, truths: Truths) -> None:
    dtype = getattr(torch, type_name)
    if any(key[0] != op or key[2] != dtype for key in truths):
        truths.clear()
    before = _cpu.isa()
    _cpu.set_isa(before if isa == "any" else isa)
    try:
        report = check(op, backend, dtype, truths=truths)
    finally:
        _cpu.set_isa(before)
    assert report.passed, str(report)
    assert report.num_cases > 0


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", LONG)
def test_contexts_of_128k(op: str, dtype: torch.dtype) -> None:
    report = check(op, "cpu", dtype, full=True, only="128K")
    assert report.passed, str(report)
    assert report.num_cases == 1


def test_every_op_has_cases() -> None:
    REGISTRY.load()
    assert set(REGISTRY.ops) == set(all_cases())


@pytest.mark.parametrize("op", sorted(all_cases()))
def test_cases_are_well_formed(op: str) -> None:
    """Names differ, inputs repeat, and the sizes of real models can be built."""
    cases = cases_of(op)
    names = [case.name for case in cases.cases()]
    assert len(names) == len(set(names)) > 0
    for dtype in cases.tolerance:
        assert cases.tolerance[dtype].reason
        first = next(iter(cases.cases()))
        once, again = (first.arguments(dtype) for _ in range(2))
        for a, b in zip(once, again, strict=True):
            if isinstance(a, Tensor):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
    if cases.sized is not None:
        for shapes in cases.examples:
            dtype = next(iter(cases.tolerance))
            arguments = cases.sized(Inputs(dtype), 2, shapes)
            if cases.work is not None:
                assert cases.work(arguments).bytes > 0


def test_moving_keeps_strides_and_surroundings() -> None:
    x = Inputs(torch.float32).inside(torch.ones(2, 3))
    there = moved(x, torch.device("meta"))
    assert (there.shape, there.stride(), there.storage_offset()) == ((2, 3), (11, 1), 3)


def test_what_is_allocated_and_not_written_is_seen() -> None:
    with poisoned_allocations():
        assert torch.empty(7).isnan().all()
    x = torch.ones(3, 5)
    with poisoned_allocations():
        assert not _cpu.silu_mul(torch.ones(3, 4)).isnan().any()
        assert torch.empty_like(x).isnan().all()


STRICT = Tolerance(1e-6, "a test")


@pytest.mark.parametrize(
    ("found", "true", "share"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0 + 4e-6], [1.0, 2.0], 2.0),
        ([0.0, 2.0 + 4e-6], [100.0, 2.0], 1e6),
        ([float("inf"), 1.0], [float("inf"), 1.0], 0.0),
        ([1e-20, 0.0], [0.0, 0.0], 1e-5),
    ],
)
def test_distance(found: list[float], true: list[float], share: float) -> None:
    error, why = distance(torch.tensor(found).double(), torch.tensor(true).double(), STRICT)
    assert (error, why) == (pytest.approx(share, rel=0.1), "")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1.0, float("inf")]), "inf"),
        (torch.ones(3), "shape"),
        (torch.ones(2, dtype=torch.int32), "int32"),
    ],
)
def test_what_is_no_matter_of_precision(found: Tensor, why: str) -> None:
    error, reason = distance(found, torch.ones(2), STRICT)
    assert error == float("inf")
    assert why in reason


def test_integers_may_differ_as_often_as_is_stated() -> None:
    true = torch.arange(100)
    found = true.clone()
    found[3] = 0
    assert distance(found, true, STRICT, 0.01) == (1.0, "")
    assert distance(found, true, STRICT, 0.005)[0] == float("inf")


def _no_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    reference = REGISTRY.ops["add_rms_norm"].reference
    normed, _ = reference(x, residual, weight, eps)
    return normed, torch.empty_like(x)


def _reads_beyond(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.as_strided((*x.shape[:-1], x.shape[-1] + 1), x.stride())
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x * scale * weight


def _raises(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise RuntimeError("a device was lost")


@pytest.mark.parametrize(
    ("op", "kernel", "says"),
    [
        ("add_rms_norm", _no_residual, "NaN where there is none"),
        ("rms_norm", _reads_beyond, "NaN where there is none"),
        ("rms_norm", _raises, "RuntimeError: a device was lost"),
    ],
)
def test_a_wrong_kernel_is_caught(
    op: str, kernel: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    REGISTRY.load()
    monkeypatch.setitem(REGISTRY.backends, op, dict(REGISTRY.backends[op]))
    REGISTRY.register(op, "wrong", kernel)  # type: ignore[arg-type]
    report = check(op, "wrong", torch.float32, only="strided")
    if op == "rms_norm" and kernel is _raises:
        report = check(op, "wrong", torch.float32)
    assert not report.passed
    assert says in str(report)


def test_a_case_tolerates_what_it_states() -> None:
    usual, loose = Tolerance(1e-6, "usual"), Tolerance(1e-1, "a coarse format")
    case = Case("x", lambda g: (g.normal(3, 8),), looser=loose)
    cases = OpCases("rms_norm", lambda: [case], {torch.float32: usual})
    from tokenspeed.kernels.cases.check import _tolerance

    assert _tolerance(cases, case, torch.float32) is loose
    assert _tolerance(cases, Case("y", case.build), torch.float32) is usual
