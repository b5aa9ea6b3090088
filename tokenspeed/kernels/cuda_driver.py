# SPDX-License-Identifier: MIT
"""Kernels of csrc/cuda on the device: cubins that the build made, loaded by the CUDA driver.

Needs the package `cuda.bindings` and no compiler. Launches allow programmatic dependence: a kernel
may be set up before the one ahead of it has ended, and waits by itself. Refuses to know what a
kernel computes.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver

CUBINS = Path(__file__).resolve().parents[1] / "cubin"


def cubin(name: str, arch: str) -> Path:
    """Where the build puts csrc/cuda/<name>.cu compiled for an architecture such as "sm_90a"."""
    return CUBINS / f"{name}.{arch}.cubin"


def missing(name: str, arch: str) -> str | None:
    """Why a cubin cannot be used, None if it is there."""
    if cubin(name, arch).is_file():
        return None
    return f"{name}.{arch}.cubin is not built: it takes nvcc at build time"


def _checked(result: tuple[Any, ...]) -> Any:
    """What a driver's call gave; `RuntimeError` with the driver's own name for a failure."""
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {code.name}")
    return values[0] if values else None


@cache
def _function(name: str, arch: str, entry: str, shared_bytes: int, device: int) -> Any:
    """A kernel loaded in a device's primary context."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(cubin(name, arch).read_bytes()))
        function = _checked(driver.cuModuleGetFunction(module, entry.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def _attribute() -> Any:
    made = driver.CUlaunchAttribute()
    made.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    made.value.programmaticStreamSerializationAllowed = 1
    return made


def launch(
    name: str,
    arch: str,
    entry: str,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    params: bytes,
) -> None:
    """Runs `entry` of csrc/cuda/<name>.cu on torch's current stream, its only argument `params`.

    `RuntimeError`: the driver refuses. `FileNotFoundError`: the cubin is not built.
    """
    device = torch.cuda.current_device()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    config.attrs, config.numAttrs = [_attribute()], 1
    content = ctypes.create_string_buffer(params, len(params))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(content))
    function = _function(name, arch, entry, shared_bytes, device)
    _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))
