# SPDX-License-Identifier: MIT
"""`Layer`: the base of all modules, and how a module says which checkpoint tensors fill it.

Parameters are born whole on the meta device; `spmd/localise.py` cuts them to this rank's share, and
the loader allocates and fills them. Knows no files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenspeed.kernels import select
from tokenspeed.kernels.quant import Quantization, quantize
from tokenspeed.kernels.registry import Kernel, pack_of
from tokenspeed.spmd.placement import Flow, ModuleSpec
from tokenspeed.spmd.shards import Cut, Region


@dataclass(frozen=True)
class Target:
    """What layers are built for: kernels are chosen and parameters made by these."""

    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None = None  # of weights that are multiplied with

    def kernel(self, op: str, **shapes: int) -> Kernel:
        """The implementation of `op` that a layer keeps."""
        return select(op, device=self.device, dtype=self.dtype, backend=None, **shapes)

    def weight_kernel(self, op: str, **shapes: int) -> Kernel:
        """`kernel`, or that of `{op}_quant` if weights are quantised: for `pack`ed weights."""
        if self.quantization is None:
            return self.kernel(op, **shapes)
        return self.kernel(f"{op}_quant", group=self.quantization.group, **shapes)

    def pack(self, kernel: Kernel, weight: Tensor) -> Any:
        """The weight as `kernel`, a `weight_kernel`, wants it. `ValueError`: not quantisable."""
        form, pack = self.quantization, pack_of(kernel)
        held = weight if form is None else quantize(weight, form.format, form.group)
        return held if pack is None else pack(held)


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor: its name relative to the module's parent, and where it goes.

    `pick` is what this rank reads of it, a slice for each dimension; None: nothing. `write` copies
    exactly that piece, in any float dtype, into the module's parameters.
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    pick: tuple[slice, ...] | None
    write: Callable[[Tensor], object]


class Layer(nn.Module):
    """A module with a boundary (`spec`) and, if it has children, the `flows` between them."""

    spec: ModuleSpec = ModuleSpec()
    flows: tuple[Flow, ...] = ()
    is_here: bool = True  # False on the ranks of other pipeline stages
    cuts: dict[str, Cut]  # by parameter: the piece that this rank holds

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.cuts = {}

    def __call__(self, *args: Any) -> Any:
        """`forward` without the hooks of `nn.Module`, which cost more than a small kernel."""
        return self.forward(*args)

    @property
    def borrowed(self) -> Mapping[str, nn.Parameter]:
        """Parameters of other modules that this one multiplies with, by the name in its spec."""
        return {}

    def choose_kernels(self) -> None:
        """Called once the parameters have their local shapes: sizes of kernels are local sizes."""

    def pack_weights(self) -> None:
        """Called once the parameters are filled: brings them into the form that kernels take."""

    def give_up(self, parameter: str) -> None:
        """Frees a parameter that is held in another form now; its shape stays."""
        whole = self.get_parameter(parameter)
        meta = nn.Parameter(torch.empty_like(whole, device="meta"), requires_grad=False)
        self.register_parameter(parameter, meta)
        self.__dict__[parameter] = meta

    def settle(self) -> None:
        """Makes parameters and children plain attributes: found at once, not by `__getattr__`.

        Called when the parameters are in place; assigning one later undoes it for that one.
        """
        self.__dict__.update(self._parameters)
        for name, child in self._modules.items():
            self.__dict__.setdefault(name, child)

    def sources(self) -> Iterator[Source]:
        """The checkpoint tensors that fill this module's own parameters, each exactly once."""
        return iter(())

    def source(self, name: str, parameter: str, *region: int | slice) -> Source:
        """The checkpoint tensor `name` fills `region` (by default all) of a whole parameter."""
        cut = self.cuts[parameter]
        shape = torch.empty(cut.global_shape, device="meta")[region].shape
        found = cut.pick(region) if self.holds(parameter) else None
        if found is None:
            return Source(name, tuple(shape), None, write_nothing)
        pick, local = found
        return Source(name, tuple(shape), pick, partial(self._fill, parameter, local))

    def holds(self, parameter: str) -> bool:
        """Whether this rank has the parameter at all."""
        return self._parameters[parameter] is not None

    def _fill(self, parameter: str, region: Region, tensor: Tensor) -> None:
        self.get_parameter(parameter)[region].copy_(tensor)

    def own_parameter(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> None:
        """Makes the parameter `name`, whole and on the meta device, in the target's dtype."""
        empty = torch.empty(shape, dtype=dtype or self.target.dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.cuts[name] = Cut.whole(shape)


def write_nothing(tensor: Tensor) -> None:
    """The `write` of a source of which this rank reads nothing."""
    raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} belongs to another rank")
