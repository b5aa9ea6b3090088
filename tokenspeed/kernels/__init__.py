# SPDX-License-Identifier: MIT
"""One module per op family: signatures, torch references; a sibling per backend. Knows no layers.

`select(op, device=, dtype=, **shapes)` returns the callable that a layer keeps; `explain` says why.
Importing this needs no compiled module and no GPU.
"""

from tokenspeed.kernels.registry import explain, force_backend, register, select

__all__ = ["explain", "force_backend", "register", "select"]
