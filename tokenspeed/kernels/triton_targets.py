# SPDX-License-Identifier: MIT
"""GPU architectures that kernels are compiled for without the device, and what must come out.

Knows limits of hardware and no kernel. A module of Triton or Gluon kernels has a function
`specimens(arch)` that yields a `Specimen` for each shape in which it launches its kernels there;
`tests/kernels/aot.py` compiles and judges them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """An architecture: what the compiler calls it, and the shared memory a block may have."""

    backend: str  # "cuda" or "hip"
    name: int | str
    warp_size: int
    max_shared_bytes: int
    matrix: str  # the instruction of its matrix units, as disassembled


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 166_912, "HMMA"),
    "sm_90": Target("cuda", 90, 32, 232_448, "HGMMA"),
    "sm_100": Target("cuda", 100, 32, 232_448, "UTC.?MMA"),
    "sm_120": Target("cuda", 120, 32, 101_376, "HMMA"),
    "gfx942": Target("hip", "gfx942", 64, 65_536, "v_mfma"),
    "gfx950": Target("hip", "gfx950", 64, 163_840, "v_mfma"),
}


@dataclass(frozen=True)
class Specimen:
    """One compiled form of a kernel.

    `signature` gives the types of run-time arguments: "*bf16" (a pointer, 16 bytes aligned), "i32",
    "fp32"; ":16" behind an integer says that it is divisible by 16. Everything else is in
    `constants`, an argument that is None too. `matrix`: the architecture's matrix instruction must
    appear; `must` and `never` are patterns of further instructions (SASS, amdgcn). `quick`: belongs
    to the subset that is compiled on every test run.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False
    must: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    quick: bool = False
