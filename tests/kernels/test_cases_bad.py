# SPDX-License-Identifier: MIT
"""Bad input: what a kernel cannot take is refused with the op's and the argument's name.

Every tensor of an op's first case is spoilt in turn. The references and the compiled kernels are
checked here.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import interpreting
from tokenspeed.kernels.call_check import Argument, read_call
from tokenspeed.kernels.cases import Case, all_cases, cases_of
from tokenspeed.kernels.cases.check import packed
from tokenspeed.kernels.plugins import GPU_BACKENDS
from tokenspeed.kernels.registry import REGISTRY

INTERPRETED = ("triton",) if interpreting() else ()


SLOW = (("attention_mla", "triton"),)  # in the interpreter


def kernels(*more: str) -> Iterator[Any]:
    REGISTRY.load(gpu=bool(more))
    for op in sorted(all_cases()):
        for backend in REGISTRY.of(op) if op in REGISTRY.ops else ():
            if backend.name not in GPU_BACKENDS or backend.name in more:
                slow = (op, backend.name) in SLOW
                yield pytest.param(op, backend.name, marks=[pytest.mark.full] if slow else [])


def first_case(op: str) -> Case:
    """The first whose tensors all have elements."""
    for case in cases_of(op).cases():
        tensors = [a for a in case.arguments(torch.float32) if isinstance(a, Tensor)]
        if tensors and all(t.numel() > 1 for t in tensors):
            return case
    raise AssertionError(f"{op} has no case with elements in every tensor")


def spoilt(arguments: tuple[Any, ...], op: str) -> Iterator[tuple[Argument, str, tuple[Any, ...]]]:
    """(argument, what was done to it, the call) for every documented tensor of the call."""
    documented = read_call(REGISTRY.ops[op].call)
    for place, (argument, value) in enumerate(zip(documented, arguments, strict=False)):
        if argument.axes is None or not isinstance(value, Tensor):
            continue
        ways = {"one axis more": value.unsqueeze(0), "no tensor": None}
        ways["wrong dtype"] = value.to(torch.int16 if value.dtype == torch.bool else torch.bool)
        if argument.not_negative and value.numel():
            ways["below 0"] = torch.full_like(value, -1)
        if argument.optional:
            del ways["no tensor"]
        if argument.behind is not None:  # any number of axes
            del ways["one axis more"]
        for way, bad in ways.items():
            yield argument, way, (*arguments[:place], bad, *arguments[place + 1 :])


def names_op(error: Exception, op: str, backend: str) -> bool:
    """Whether the text begins with the op; the compiled functions serve several."""
    names = {op}
    if backend != "reference":
        names |= {op.removesuffix("_quant"), op.removeprefix("all_reduce_")}
        names |= {op.removeprefix("reduce_scatter_")}
    return str(error).startswith(tuple(name + mark for name in names for mark in (": ", "(")))


@pytest.mark.parametrize(("op", "name"), list(kernels(*INTERPRETED)))
def test_what_cannot_be_taken_is_named(op: str, name: str) -> None:
    backend, cases = REGISTRY.backends[op][name], cases_of(op)
    good = packed(cases, backend.pack, first_case(op).arguments(torch.float32))
    backend.kernel(*good)
    good = packed(cases, backend.pack, first_case(op).arguments(torch.float32))
    silent = []
    for argument, way, arguments in spoilt(good, op):
        if way == "below 0" and name in GPU_BACKENDS:  # values on a device are not looked at
            continue
        try:
            backend.kernel(*arguments)
        except (ValueError, TypeError) as error:
            if argument.name not in str(error) or not names_op(error, op, name):
                silent.append(f"{argument.name}, {way}: {error}")
        except Exception as error:
            silent.append(f"{argument.name}, {way}: {type(error).__name__}: {error}")
        else:
            silent.append(f"{argument.name}, {way}: taken")
    assert silent == []


def elsewhere(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in memory laid out otherwise."""
    doubled = torch.stack([value, value], dim=-1)
    yield "every other element", doubled[..., 0]
    odd = torch.empty(value.numel() + 1, dtype=value.dtype)[1:]
    yield "an odd address", odd.view(value.shape).copy_(value)


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


@pytest.mark.parametrize(("op", "name"), list(kernels()))
def test_memory_laid_out_otherwise_is_read_right_or_refused(op: str, name: str) -> None:
    backend, cases = REGISTRY.backends[op][name], cases_of(op)

    def fresh() -> tuple[Any, ...]:
        return packed(cases, backend.pack, first_case(op).arguments(torch.float32))

    good = fresh()
    expected = tensors_in(backend.kernel(*good)) + tensors_in(good)
    wrong = []
    for place, value in enumerate(good):
        if not isinstance(value, Tensor):
            continue
        for way, _ in elsewhere(value):
            arguments = list(fresh())
            arguments[place] = dict(elsewhere(arguments[place]))[way]
            try:
                found = tensors_in(backend.kernel(*arguments)) + tensors_in(arguments)
            except ValueError as error:
                if not names_op(error, op, name):
                    wrong.append(f"argument {place}, {way}: {error}")
                continue
            pairs = zip(found, expected, strict=True)
            if not all(torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in pairs):
                wrong.append(f"argument {place}, {way}: other values")
    assert wrong == []


@pytest.mark.parametrize(
    ("op", "change", "says"),
    [
        ("moe", {4: lambda ids: ids + 100}, r"moe: ids\b.*(range|bounds)"),
        ("rope_append_gqa", {4: lambda p: p + 10_000}, "rope_append_gqa: positions or cache_index"),
        ("rope_append_gqa", {5: lambda i: i + 10_000}, "rope_append_gqa: positions or cache_index"),
        ("attention_gqa", {4: lambda s: s + 1000}, "attention_gqa: .*slots"),
        ("copy_pages", {2: lambda p: p + 1000}, "copy_pages: sources or targets"),
        ("logprobs", {1: lambda i: i + 10**6}, "logprobs: ids"),
    ],
)
def test_indices_out_of_range(op: str, change: dict[int, Any], says: str) -> None:
    arguments = list(first_case(op).arguments(torch.float32))
    for place, way in change.items():
        arguments[place] = way(arguments[place])
    with pytest.raises(ValueError, match=says):
        REGISTRY.backends[op]["reference"].kernel(*arguments)


def test_tensors_of_two_devices() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="rms_norm: weight is on meta, others on cpu"):
        REGISTRY.backends["rms_norm"]["reference"].kernel(x, weight, 1e-6)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("(x[T,2I]) -> [T,I]", ["x 2 axes"]),
        ("(x[T,...,D], ids[T,k] int32, bias[N] or None, eps) -> (a, b)",
         ["x 2 axes", "ids 2 axes", "bias 1 axes, or None", "eps"]),
        ("(index[T] int64 >= 0, tail[S,R+1]=None)", ["index 1 axes, 0 up", "tail 2 axes, or None"]),
    ],
)  # fmt: skip
def test_reading_a_call(call: str, expected: list[str]) -> None:
    found = []
    for a in read_call(call):
        text = a.name
        if a.axes is not None:
            text += f" {len(a.axes) + len(a.behind or ())} axes"
        found.append(text + ", or None" * a.optional + ", 0 up" * a.not_negative)
    assert found == expected


def test_sizes_must_agree() -> None:
    kernel = REGISTRY.backends["silu_mul"]["reference"].kernel
    with pytest.raises(ValueError, match=r"silu_mul: x has shape \[2, 3\], not \[2, 2I\]"):
        kernel(torch.ones(2, 3))
    kernel = REGISTRY.backends["linear"]["reference"].kernel
    with pytest.raises(ValueError, match=r"linear: weight has shape \[5, 4\], not \[5, 3\]"):
        kernel(torch.ones(2, 3), torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"linear: bias has shape \[4\], not \[5\]"):
        kernel(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4))
