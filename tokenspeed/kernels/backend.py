# SPDX-License-Identifier: MIT
"""The nouns of the kernel layer: an op, what a layer asks for, what implements it, and a verdict.

Refuses to know what any op computes and how a choice is made.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from tokenspeed.kernels.device import arch_of

Kernel = Callable[..., Any]
Pack = Callable[[Any], Any]


@dataclass(frozen=True)
class Op:
    """An operation: its name, its call with documented shapes, and the plain torch reference."""

    name: str
    call: str
    reference: Kernel

    @property
    def by_tokens(self) -> bool:
        """Whether the call begins with a tensor of one row a token (T) or a sequence (B)."""
        return re.match(r"\(\w+\[[TB]\b", self.call) is not None


@dataclass(frozen=True)
class Ask:
    """What a layer asks for: an op on a device, in the dtype of its activations, for shapes.

    `arch` is the device's architecture ("cpu", "sm_90", "gfx950"); by default that of the device
    that is present.
    """

    op: str
    device: str
    dtype: torch.dtype
    shapes: Mapping[str, int]
    arch: str = ""

    def __post_init__(self) -> None:
        if not self.arch:
            object.__setattr__(self, "arch", arch_of(self.device))

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in sorted(self.shapes.items()))
        place = self.device if self.arch == self.device else f"{self.device} ({self.arch})"
        return f"{self.op}({sizes}) in {_name(self.dtype)} on {place}"


@dataclass(frozen=True)
class Backend:
    """One implementation. `requires` returns why it cannot serve an `Ask`, or None if it can.

    `archs` are names or patterns such as "gfx9*". `pack` brings a weight into the layout that
    `kernel` takes in its place.
    """

    op: str
    name: str
    kernel: Kernel
    devices: tuple[str, ...] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] | None = None
    requires: Callable[[Ask], str | None] | None = None
    priority: int = 0  # the highest that can serve is taken; the reference has -1
    archs: tuple[str, ...] | None = None
    pack: Pack | None = None

    def refusal(self, ask: Ask) -> str | None:
        if self.devices is not None and ask.device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {ask.device}"
        if self.archs is not None and not any(fnmatchcase(ask.arch, a) for a in self.archs):
            return f"runs on {', '.join(self.archs)}, not on {ask.arch}"
        if self.dtypes is not None and ask.dtype not in self.dtypes:
            return f"takes {', '.join(map(_name, self.dtypes))}, not {_name(ask.dtype)}"
        try:
            return self.requires(ask) if self.requires is not None else None
        except Exception as error:  # foreign code: its own report, not our crash
            return f"its requirement raised {type(error).__name__}: {error}"


@dataclass(frozen=True)
class Verdict:
    """Why a backend was taken or not."""

    backend: str
    chosen: bool
    reason: str


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
