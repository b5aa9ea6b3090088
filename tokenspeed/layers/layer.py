# SPDX-License-Identifier: MIT
"""`Layer`: the base of all modules, and how a module says which checkpoint tensors fill it.

Parameters are born on the meta device; the loader allocates and fills them. Knows no files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenspeed.kernels import select
from tokenspeed.kernels.registry import Kernel
from tokenspeed.spmd.placement import ModuleSpec


@dataclass(frozen=True)
class Target:
    """What layers are built for: kernels are chosen and parameters made by these."""

    device: torch.device
    dtype: torch.dtype

    def kernel(self, op: str, **shapes: int) -> Kernel:
        """The implementation of `op` that a layer keeps."""
        return select(op, device=self.device, dtype=self.dtype, backend=None, **shapes)


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor: its name relative to the module's parent, and where it goes.

    `write` copies a tensor of exactly `shape`, in any float dtype, into the module's parameters.
    """

    name: str
    shape: tuple[int, ...]
    write: Callable[[Tensor], object]


class Layer(nn.Module):
    """A module with a boundary (`spec`) and, if it has children, the `flows` between them."""

    spec: ModuleSpec = ModuleSpec()
    flows: tuple[tuple[str, ...], ...] = ()

    def __call__(self, *args: Any) -> Any:
        """`forward` without the hooks of `nn.Module`, which cost more than a small kernel."""
        return self.forward(*args)

    def settle(self) -> None:
        """Makes parameters and children plain attributes: found at once, not by `__getattr__`.

        Called when the parameters are in place; assigning one later undoes it for that one.
        """
        self.__dict__.update(self._parameters)
        self.__dict__.update(self._modules)

    def sources(self) -> Iterator[Source]:
        """The checkpoint tensors that fill this module's own parameters, each exactly once."""
        return iter(())

    def source(self, name: str, parameter: str, *region: int | slice) -> Source:
        """The checkpoint tensor `name` fills `region` (all of it by default) of a parameter."""
        shape = tuple(self.get_parameter(parameter)[region].shape)
        return Source(name, shape, partial(self._fill, parameter, region))

    def _fill(self, parameter: str, region: tuple[int | slice, ...], tensor: Tensor) -> None:
        self.get_parameter(parameter)[region].copy_(tensor)

    def own_parameter(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
