# SPDX-License-Identifier: MIT
"""What this machine has for GPU kernels, and what it lacks. Runs nothing on a device."""

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from tokenspeed.kernels.registry import REGISTRY

PACKAGES = ("torch", "triton", "cuda-bindings", "numpy")


def describe() -> dict[str, Any]:
    """Device, driver and versions; names that are missing are None."""
    made: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            made[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            made[package] = None
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        made["device"] = found.name
        made["capability"] = f"{found.major}.{found.minor}"
        made["multiprocessors"] = found.multi_processor_count
        made["l2_bytes"] = found.L2_cache_size
        made["memory_bytes"] = found.total_memory
    return made


def lacks() -> list[str]:
    """Reasons why nothing can be measured here, or why something is left out."""
    reasons = []
    if not torch.cuda.is_available():
        reasons.append(f"no CUDA device (torch {torch.__version__} sees none)")
    if importlib.util.find_spec("triton") is None:
        reasons.append("no triton: no kernel of ours")
    REGISTRY.load()
    reasons += [f"{source} needs {name}" for source, name in REGISTRY.sources.missing.items()]
    reasons += [f"{source} did not load: {why}" for source, why in REGISTRY.problems.items()]
    return reasons
