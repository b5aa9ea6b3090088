# SPDX-License-Identifier: MIT
"""The nouns of kernel checks: a case, its inputs, and what an op's cases have in common.

Inputs are made on the CPU from a seed of the case's name, the same on every machine, and moved to
the device with their strides. Refuses to know which backends there are.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Level = Literal["quick", "full"]
FLOAT_TYPES = (torch.float32, torch.bfloat16)


class Inputs:
    """Makes a case's tensors: `dtype` is that of the ask, `normal(...)` and others draw from it."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Gaussian values of standard deviation `scale`."""
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(dtype)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def some_of(self, count: int, number: int) -> Tensor:
        """`number` different integers below `count`, int64, shuffled."""
        return torch.randperm(count, generator=self.generator)[:number]

    def inside(self, x: Tensor, before: int = 3, behind: int = 5) -> Tensor:
        """The same values as a slice along the last axis of a wider tensor that is NaN elsewhere.

        What a fused projection's output looks like to the kernel that reads a part of it.
        """
        wide = x.new_full((*x.shape[:-1], before + x.shape[-1] + behind), float("nan"))
        wide[..., before : before + x.shape[-1]] = x
        return wide[..., before : before + x.shape[-1]]


@dataclass(frozen=True)
class Tolerance:
    """An output may differ from the truth by `share` of the largest value of its row.

    A row is the last axis; one whose values are all below `least` counts as that large. `reason`
    says where the difference comes from.
    """

    share: float
    reason: str
    least: float = 1e-9


@dataclass(frozen=True)
class Case:
    """One call: `build(inputs, *params)` gives its arguments; `shapes` is what a layer would ask.

    Level "full" is left out of quick suites: it takes seconds or much memory. `looser` is what
    this case tolerates, where its numbers or its format allow less than the dtype does.
    """

    name: str
    build: Callable[..., Arguments]
    params: Arguments = ()
    shapes: Mapping[str, int] = field(default_factory=dict)
    level: Level = "quick"
    looser: Tolerance | None = None

    def arguments(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Arguments:
        """Fresh arguments, the same ones each time."""
        made = self.build(Inputs(dtype, zlib.crc32(self.name.encode())), *self.params)
        return tuple(moved(argument, torch.device(device)) for argument in made)


@dataclass(frozen=True)
class Work:
    """What one call must move from or to memory at least, and compute."""

    bytes: float
    flops: float


def returned(result: Any, arguments: Arguments) -> tuple[Tensor, ...]:
    """The tensors that a call gave back."""
    return tuple(result) if isinstance(result, tuple) else (result,)


def in_float64(reference: Callable[..., Any], arguments: Arguments) -> Any:
    """The truth: the reference on the same numbers, held in float64."""
    wide = [a.double() if _is_float(a) else a for a in arguments]
    return reference(*wide), tuple(wide)


def as_asked(reference: Callable[..., Any], arguments: Arguments) -> Any:
    """The truth of ops whose results are choices: the reference in the dtype of the call."""
    return reference(*arguments), arguments


@dataclass(frozen=True)
class OpCases:
    """All cases of one op.

    `tolerance` also says which dtypes are checked. `weights` are the places of arguments that a
    backend may want packed. `read(result, arguments)` gives the tensors to compare, by default what
    is returned; `truth(reference, arguments)` gives the true result and the arguments that it left.
    `share_of_mistakes`: of the integers of an output that may differ, where float ties decide.

    For measuring, `sized(inputs, tokens, shapes)` makes arguments of the sizes that a layer asks
    for, `work(arguments)` says what they cost, `examples` are sizes of real models.
    """

    op: str
    cases: Callable[[], Iterable[Case]]
    tolerance: Mapping[torch.dtype, Tolerance]
    weights: tuple[int, ...] = ()
    read: Callable[[Any, Arguments], tuple[Tensor, ...]] = returned
    truth: Callable[[Callable[..., Any], Arguments], Any] = in_float64
    share_of_mistakes: float = 0.0
    sized: Callable[[Inputs, int, Mapping[str, int]], Arguments] | None = None
    work: Callable[[Arguments], Work] | None = None
    examples: tuple[Mapping[str, int], ...] = ()


def floats(
    float32: float, bfloat16: float, reason: str, least: float = 1e-9
) -> dict[torch.dtype, Tolerance]:
    """Tolerances of an op in both float types; in bfloat16 the result's rounding comes on top."""
    return {
        torch.float32: Tolerance(float32, reason, least),
        torch.bfloat16: Tolerance(bfloat16, f"{reason}; rounding to 8 bits", least),
    }


def _is_float(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def moved(argument: Any, device: torch.device) -> Any:
    """The argument on the device, tensors with the strides and the surroundings that they have."""
    if not isinstance(argument, Tensor) or argument.device == device:
        return argument
    count = argument.untyped_storage().nbytes() // argument.element_size()
    all_of_it = argument.as_strided((count,), (1,), 0).to(device)
    return all_of_it.as_strided(argument.shape, argument.stride(), argument.storage_offset())
