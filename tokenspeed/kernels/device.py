# SPDX-License-Identifier: MIT
"""What kernels may depend on of a device: its architecture, name, and what compiled for it.

Refuses to know any kernel. Asks a GPU library only about devices that are asked for by name.
"""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch

UNKNOWN = "unknown"  # the architecture of a device that is not here
GPU_ARCHS = ("sm_", "gfx")


def arch_of(device: str) -> str:
    """The architecture of the device type that is present: "cpu", "sm_90", "gfx950"...

    `UNKNOWN` for a GPU that this machine lacks; other types are their own architecture.
    """
    if device != "cuda":
        return device
    if not torch.cuda.is_available():
        return UNKNOWN
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def device_of_arch(arch: str) -> str:
    """The device type that has this architecture: both NVIDIA's and AMD's are torch's "cuda"."""
    return "cuda" if arch.startswith(GPU_ARCHS) else arch


@dataclass(frozen=True)
class Machine:
    """What a measured time holds for: the device, and the versions of all that made the kernels."""

    name: str
    arch: str
    versions: dict[str, str] = field(default_factory=dict)


def this_machine(device: str) -> Machine:
    """The present device of this type. `ValueError`: there is none."""
    arch = arch_of(device)
    if arch == UNKNOWN:
        raise ValueError(f"device: no {device} device is present")
    versions = {"tokenspeed": _version("tokenspeed"), "torch": torch.__version__.partition("+")[0]}
    if device == "cuda":
        versions["triton"] = _version("triton")
        return Machine(torch.cuda.get_device_name(), arch, versions)
    instructions, threads = _compiled()
    return Machine(f"{_cpu_name()}, {threads} threads", arch, versions | instructions)


def use_cpu_threads(count: int) -> None:
    """How many threads the CPU kernels of this process have from now on. `ValueError`: too many."""
    from tokenspeed import _cpu

    most = os.cpu_count() or 1
    if count > most:
        raise ValueError(f"cpu_threads: {count} on a machine of {most} cores")
    _cpu.set_num_threads(count)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiled() -> tuple[dict[str, str], int]:
    """What the compiled kernels were made with and run on, and their number of threads."""
    try:
        from tokenspeed import _cpu
    except ImportError:
        return {"compiler": "none"}, torch.get_num_threads()
    return {"compiler": _cpu.compiler(), "instructions": _cpu.isa()}, _cpu.num_threads()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
