# SPDX-License-Identifier: MIT
"""Checks a call's tensors against the op's documented call, so that an error names op and argument.

The text that `define` gets is read: `x[T,2I]` is a tensor of two axes, T the same everywhere, the
second even; `ids[T,k] int32` has that dtype; `positions[T] int32 >= 0` no value below 0 (looked at
on a CPU only); what has no brackets is not checked. The compiled backends check their arguments
themselves.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "bool": (torch.bool,),
    "f32": (torch.float32, torch.float64),
}
_PART = re.compile(r"(\w+)(?:\[([^\]]*)\])?([^,\[\]]*(?:\[[^\]]*\])?[^,]*)(?:,\s*|$)")
_AXIS = re.compile(r"(\d*)\s*([A-Za-z_]\w*)(?:\s*\+\s*(\d+))?")


@dataclass(frozen=True)
class Axis:
    """A size of `times` * the value of `name` + `plus`."""

    name: str
    times: int
    plus: int

    def text(self, sizes: Mapping[str, int]) -> str:
        known = sizes.get(self.name)
        if known is not None:
            return f"{self.times * known + self.plus}"
        return (
            (f"{self.times}" * (self.times > 1)) + self.name + f" + {self.plus}" * (self.plus > 0)
        )


@dataclass(frozen=True)
class Argument:
    """`axes` None: no tensor, or one of any shape. An axis None: any size. `behind` come after
    any number of axes; None: there are no others.
    """

    name: str
    axes: tuple[Axis | None, ...] | None
    behind: tuple[Axis | None, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    optional: bool
    not_negative: bool

    @property
    def is_index(self) -> bool:
        return self.dtypes in (DTYPES["int32"], DTYPES["int64"])

    def axes_of(self, ndim: int) -> tuple[Axis | None, ...]:
        """As many as a tensor of so many axes has, or those that it should have."""
        axes, behind = self.axes or (), self.behind
        if behind is None:
            return axes
        return axes + (None,) * max(ndim - len(axes) - len(behind), 0) + behind


def read_call(call: str) -> tuple[Argument, ...]:
    """The arguments of a documented call, `(x[T,D], ...) -> ...`."""
    inside = call[1 : _closing(call)]
    return tuple(_argument(*found.groups(default="")) for found in _PART.finditer(inside))


def _closing(call: str) -> int:
    depth = 0
    for place, letter in enumerate(call):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    raise ValueError(f"the call {call!r} has no end")


def _argument(name: str, axes: str, rest: str) -> Argument:
    words = rest.split()
    dtypes = next((DTYPES[word] for word in words if word in DTYPES), None)
    texts = [text.strip() for text in axes.split(",")]
    known = tuple(map(_axis, texts)) if axes else None
    behind: tuple[Axis | None, ...] | None = None
    if "..." in texts:
        gap = texts.index("...")
        known, behind = tuple(map(_axis, texts[:gap])), tuple(map(_axis, texts[gap + 1 :]))
    return Argument(name, known, behind, dtypes, "None" in rest, ">=" in words)


def _axis(text: str) -> Axis | None:
    found = _AXIS.fullmatch(text.strip())
    return Axis(found[2], int(found[1] or 1), int(found[3] or 0)) if found else None


def checked(
    op: str, call: str, kernel: Callable[..., Any], *, on_gpu: bool = False
) -> Callable[..., Any]:
    """`kernel` behind a check of its arguments: `ValueError` naming op, argument and value.

    `on_gpu`: no float64, integer tensors must be contiguous, and their values are not looked at.
    """
    arguments = read_call(call)
    anywhere = "any device" in call

    @wraps(kernel)
    def run(*values: Any, **named: Any) -> Any:
        sizes: dict[str, int] = {}
        device: torch.device | None = None
        for argument, value in zip(arguments, values, strict=False):
            if argument.axes is None:
                continue
            if not isinstance(value, Tensor):
                if value is not None or not argument.optional:
                    kind = type(value).__name__
                    raise ValueError(f"{op}: {argument.name} must be a tensor, is a {kind}")
                continue
            _check_tensor(op, argument, value, sizes)
            (_check_for_gpu if on_gpu else _check_values)(op, argument, value)
            if device is not None and value.device != device and not anywhere:
                raise ValueError(f"{op}: {argument.name} is on {value.device}, others on {device}")
            device = value.device
        try:
            return kernel(*values, **named)
        except (IndexError, RuntimeError) as error:
            if "out of bounds" not in str(error):
                raise
            whole = [a.name for a in arguments if a.is_index]
            raise ValueError(f"{op}: {' or '.join(whole) or 'an index'}: {error}") from error

    return run


def _check_tensor(op: str, argument: Argument, value: Tensor, sizes: dict[str, int]) -> None:
    axes = argument.axes_of(value.ndim)
    matches = value.ndim == len(axes)
    for axis, size in zip(axes, value.shape, strict=False):
        if axis is None or not matches:
            continue
        count, left = divmod(size - axis.plus, axis.times)
        matches = left == 0 and count >= 0 and sizes.setdefault(axis.name, count) == count
    if not matches:
        wanted = ", ".join("any" if a is None else a.text(sizes) for a in axes)
        raise ValueError(f"{op}: {argument.name} has shape {list(value.shape)}, not [{wanted}]")
    if argument.dtypes is not None and value.dtype not in argument.dtypes:
        raise ValueError(f"{op}: {argument.name} is {value.dtype}, not {argument.dtypes[0]}")
    if argument.dtypes is None and not (value.is_floating_point() or value.dtype == torch.uint8):
        raise ValueError(f"{op}: {argument.name} is {value.dtype}, not of a float type")


def _check_values(op: str, argument: Argument, value: Tensor) -> None:
    if argument.not_negative and value.device.type == "cpu" and value.numel() and value.min() < 0:
        raise ValueError(f"{op}: {argument.name} has {int(value.min())}, below 0")


def _check_for_gpu(op: str, argument: Argument, value: Tensor) -> None:
    if value.dtype == torch.float64:
        raise ValueError(f"{op}: {argument.name} is torch.float64, which only references take")
    if argument.is_index and not value.is_contiguous():
        strides = f"strides {list(value.stride())}"
        raise ValueError(f"{op}: {argument.name} has {strides}, must be contiguous")
