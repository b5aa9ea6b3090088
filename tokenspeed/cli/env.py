# SPDX-License-Identifier: MIT
"""`tokenspeed env`: versions and devices, for bug reports. Loads no model."""

import argparse
import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("tokenspeed", "torch", "numpy", "tokenizers", "safetensors", "starlette", "pyzmq")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("env", help="print versions and devices")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    for name, value in collect().items():
        print(f"{name:<14} {value}")
    return 0


def collect() -> dict[str, str]:
    """What a bug report needs to know of this machine."""
    import torch

    from tokenspeed import _cpu

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {_cpu.isa()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
