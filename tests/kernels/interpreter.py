# SPDX-License-Identifier: MIT
"""Triton's CPU interpreter with its arithmetic put right. Knows number formats, no kernels.

The interpreter holds bfloat16 and float8 as raw bits in integer arrays and computes on those:
`tl.dot` multiplies bit patterns, arithmetic adds them, rounding to bfloat16 cuts bits off, rounding
to e4m3 loses the mantissa's carry. Here each of them is done in float32 and rounded once, to
nearest even, as the devices do; float8 saturates, as `cvt.rn.satfinite` does. Reductions and scans
of such formats are refused: a kernel widens first.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter as engine

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_BITS = {
    torch.bfloat16: torch.uint16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
_RAW = {name for name, dtype in _TORCH.items() if dtype in _BITS}  # held as integers
_LIMIT = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

Handle = engine.TensorHandle
_Builder = engine.InterpreterBuilder
_cast, _binary, _unary = _Builder.cast_impl, _Builder.binary_op, _Builder.unary_op
_check = engine.ReduceScanOpInterface.check_tensor
_fp_to_fp, _dot, _run = _Builder.create_fp_to_fp, _Builder.create_dot, engine.GridExecutor.__call__


def interpreting() -> bool:
    """Kernels decorated from now on run in the interpreter (TRITON_INTERPRET=1)."""
    return bool(knobs.runtime.interpret)


def install() -> None:
    """From here on, everything interpreted in this process uses the corrected arithmetic."""
    _Builder.cast_impl, _Builder.create_fp_to_fp = _cast_impl, _create_fp_to_fp
    _Builder.binary_op, _Builder.unary_op = _binary_op, _unary_op
    _Builder.create_dot, engine.GridExecutor.__call__ = _create_dot, _quiet_run
    engine.ReduceScanOpInterface.check_tensor = _check_tensor


def _to_torch(handle: Handle) -> torch.Tensor:
    data = np.ascontiguousarray(handle.data)
    if handle.dtype.scalar not in _TORCH:  # an integer
        return torch.from_numpy(data.astype(np.float64))
    dtype = _TORCH[handle.dtype.scalar]
    return torch.from_numpy(data.copy()).view(dtype) if dtype in _BITS else torch.from_numpy(data)


def _from_torch(value: torch.Tensor, scalar: tl.dtype) -> Handle:
    dtype = _TORCH[scalar]
    if dtype in _LIMIT:
        value = value.clamp(-_LIMIT[dtype], _LIMIT[dtype])
    rounded = value.to(dtype)
    return Handle(rounded.view(_BITS[dtype]).numpy() if dtype in _BITS else rounded.numpy(), scalar)


def _wide(handle: Handle) -> Handle:
    """The numbers that raw bits stand for."""
    return Handle(_to_torch(handle).float().numpy(), tl.float32)


def _cast_impl(self: Any, source: Handle, target: tl.dtype) -> Handle:
    if target.scalar in _TORCH:
        return _from_torch(_to_torch(source), target.scalar)
    if source.dtype.scalar in _RAW:
        source = _wide(source)
    return _cast(self, source, target)


def _create_fp_to_fp(self: Any, source: Handle, target: tl.dtype, rounding: Any) -> Handle:
    if rounding is not None and "RTNE" not in str(rounding):
        return _fp_to_fp(self, source, target, rounding)
    return _from_torch(_to_torch(source), target.scalar)


def _binary_op(self: Any, left: Handle, right: Handle, op: Callable[..., Any]) -> Handle:
    scalar = left.dtype.scalar
    if scalar not in _RAW:
        return _binary(self, left, right, op)
    data = op(_wide(left).data, _wide(right).data)
    if data.dtype == bool:
        return Handle(data, tl.int1)
    return _from_torch(torch.as_tensor(data), scalar)


def _unary_op(self: Any, value: Handle, op: Callable[..., Any]) -> Handle:
    scalar = value.dtype.scalar
    if scalar not in _RAW:
        return _unary(self, value, op)
    return _from_torch(torch.as_tensor(op(_wide(value).data)), scalar)


def _create_dot(
    self: Any, a: Handle, b: Handle, c: Handle, precision: Any, imprecise: Any
) -> Handle:
    if a.dtype.scalar not in _TORCH or b.dtype.scalar not in _TORCH:
        return _dot(self, a, b, c, precision, imprecise)
    wide = torch.promote_types(torch.float32, _TORCH[c.dtype.scalar])
    product = torch.matmul(_to_torch(a).to(wide), _to_torch(b).to(wide))
    return _from_torch(product + _to_torch(c).to(wide), c.dtype.scalar)


def _check_tensor(self: Any, inputs: Any) -> None:
    _check(self, inputs)
    for value in inputs:
        if value.dtype.scalar in _RAW:
            raise TypeError(f"a reduction of {value.dtype.scalar}: widen to float32 first")


def _quiet_run(self: Any, *arguments: Any, **options: Any) -> Any:
    # A device divides by zero in lanes that nobody stores, and says nothing.
    with np.errstate(all="ignore"):
        return _run(self, *arguments, **options)
