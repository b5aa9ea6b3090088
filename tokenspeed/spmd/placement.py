# SPDX-License-Identifier: MIT
"""The words a module uses to say where its data lives. Knows no tensors and no communication.

The placements are those of `torch.distributed.tensor`. A `Layout` names, for each mesh axis, the
placement of one tensor; an axis that is not named replicates.

    Replicate()   every rank of the axis holds the whole tensor
    Shard(dim)    rank i holds the i-th of equal pieces along `dim`
    Partial()     the tensor is the sum over the ranks; as a weight: rank 0 holds it, the others 0
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

__all__ = ["AXES", "REPLICATED", "Layout", "Mesh", "ModuleSpec", "Partial", "Replicate", "Shard"]

Layout = Mapping[str, Placement]
REPLICATED: Layout = {}
AXES = ("tp", "ep", "dp", "pp")


@dataclass(frozen=True)
class Mesh:
    """How many ranks each axis has: tensor, expert, data (attention), pipeline parallel."""

    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1

    def size(self, axis: str) -> int:
        return int(getattr(self, axis))


@dataclass(frozen=True)
class ModuleSpec:
    """A module's boundary: hidden states in, hidden states out, and its own parameters.

    Hidden states are [tokens, features]: `Shard(0)` splits tokens, `Shard(1)` features.
    """

    inputs: Layout = field(default_factory=dict)
    outputs: Layout = field(default_factory=dict)
    weights: Mapping[str, Layout] = field(default_factory=dict)
