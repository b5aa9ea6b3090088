# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""What all Triton kernels share on the host: registration, the device at hand, launch options.

Knows no op. Kernels run on torch's "cuda" devices, NVIDIA's and AMD's; where Triton interprets
(TRITON_INTERPRET=1, in tests), on CPU tensors too, but only if they are asked for by name.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.device import arch_of
from tokenspeed.kernels.registry import REGISTRY, Ask, Kernel, Pack, register

WIDE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = bool(triton.knobs.runtime.interpret)
_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
_PRIORITY = -2 if INTERPRETED else 10  # an interpreted kernel is nobody's choice
_MODEL_ARCH = "sm_90"  # whose launch shapes the interpreter walks through
_MODEL_UNITS = 16


def register_triton(
    op: str,
    kernel: Kernel,
    dtypes: Sequence[torch.dtype] = WIDE_TYPES,
    requires: Callable[[Ask], str | None] | None = None,
    pack: Pack | None = None,
) -> None:
    """Registers the backend "triton" of an op, behind the check of its documented call."""
    register(
        op,
        "triton",
        REGISTRY.documented(op, kernel),
        devices=_DEVICES,
        dtypes=dtypes,
        requires=requires,
        priority=_PRIORITY,
        pack=pack,
    )


def expect_rows(op: str, **tensors: Tensor) -> None:
    """`ValueError` where the last axis of a tensor is strided."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the rows of {name} {_layout(tensor)} must be contiguous")


def expect_contiguous(op: str, **tensors: Tensor) -> None:
    """`ValueError` where a tensor has gaps."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} {_layout(tensor)} must be contiguous")


def expect_dtype(op: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """`ValueError` where a tensor is of another dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, must be {dtype}")


def _layout(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of strides {list(tensor.stride())}"


@cache
def _arch(device: str) -> str:
    arch = arch_of(device)
    return _MODEL_ARCH if arch == "cpu" else arch


def arch_at(x: Tensor) -> str:
    """The architecture to choose a launch for: "sm_90", "gfx950"..."""
    return _arch(x.device.type)


@cache
def _units(device: str) -> int:
    if device == "cpu":
        return _MODEL_UNITS
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def num_units(x: Tensor) -> int:
    """Multiprocessors (compute units) of the device that holds x."""
    return _units(x.device.type)


def has_pdl(arch: str) -> bool:
    """Programmatic dependent launch: a kernel's blocks may start while the one before it ends."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def pdl_options(x: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that calls `pdl_wait` first: its constant PDL, and the flag."""
    if INTERPRETED or not has_pdl(arch_at(x)):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def specimen_pdl(arch: str) -> tuple[dict[str, bool], dict[str, bool]]:
    """The same as constants and options of a specimen."""
    there = has_pdl(arch)
    return {"PDL": there}, {"launch_pdl": True} if there else {}


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Everything that kernels before this one wrote is visible from here on.

    A kernel launched with PDL writes nothing before this call, and reads weights alone.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pdl_release(PDL: tl.constexpr):
    """The next kernel's blocks may be set up from here on; there they wait for our end."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
