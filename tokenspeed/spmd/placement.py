# SPDX-License-Identifier: MIT
"""The words a module uses to say where its data lives. Knows no tensors and no communication.

The placements have the names and meanings of `torch.distributed.tensor`, whose import would take
longer than loading a small model. A `Layout` names, for each mesh axis, the placement of one
tensor; an axis that is not named replicates.

    Replicate()   every rank of the axis holds the whole tensor
    Shard(dim)    rank i holds the i-th piece along `dim`
    Partial()     the tensor is the sum over the ranks; as a weight: rank 0 holds it, the others 0
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "REPLICATED",
    "Flow",
    "Fused",
    "Inline",
    "Layout",
    "ModuleSpec",
    "Part",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "tokens",
]


@dataclass(frozen=True)
class Placement:
    """How a tensor lies on the ranks of one mesh axis."""


@dataclass(frozen=True)
class Replicate(Placement):
    """Every rank holds the whole."""


@dataclass(frozen=True)
class Shard(Placement):
    """Rank i holds the i-th piece along `dim`."""

    dim: int


@dataclass(frozen=True)
class Partial(Placement):
    """The tensor is what `reduce_op` makes of all ranks' tensors."""

    reduce_op: str = "sum"

    def __repr__(self) -> str:
        return f"Partial({self.reduce_op})"


Layout = Mapping[str, Placement]
REPLICATED: Layout = {}


def tokens(**axes: Placement) -> Layout:
    """The layout of hidden states [tokens, features]: each `dp` rank has tokens of its own.

    `axes` says what is special on the other axes: `Shard(0)` splits tokens, `Shard(1)` features.
    """
    return {"dp": Shard(0), **axes}


@dataclass(frozen=True)
class Part:
    """Some rows of a fused weight; a rank's piece is a whole number of `unit` rows (a head)."""

    size: int
    layout: Layout
    unit: int = 1


@dataclass(frozen=True)
class Fused:
    """A weight made of parts along `dim`, each divided over the ranks on its own.

        whole:   | q q q q | k k | v v |      rank 0 of 2:   | q q | k | v |

    A part on the axis `kv` has as many pieces as there are key-value heads, if these are fewer
    than the tensor-parallel ranks.
    """

    dim: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Inline:
    """A computation between two children in a flow that is not a module of its own.

    "elementwise" works on single features, "headwise" on whole sequences of single heads. Neither
    commutes with a sum, so what goes through is never `Partial`; what comes out is laid out as what
    went in, and no collective can stand at its sides. A flow may end in "shared": what all heads
    read, whole.
    """

    name: str
    kind: Literal["elementwise", "headwise", "shared"]


Kind = Literal[
    "composite",
    "embedding",
    "linear",
    "head_linear",
    "norm",  # of whole tokens
    "residual_norm",  # also adds the residual stream: has `weight`, `eps` and `add(x, residual)`
    "head_norm",  # of each head by itself
    "mean_square",  # of each token's features: where they are divided, a summand
    "scale",  # features times numbers of their token
    "router",
    "experts",
]
Flow = tuple[str | Inline, ...]


@dataclass(frozen=True)
class ModuleSpec:
    """A module's boundary: hidden states in, hidden states out, and its own parameters.

    `kind` says which typing rule of `spmd/rules.py` connects the three. A composite has no
    parameters; its `flows` do.
    """

    kind: Kind = "composite"
    inputs: Layout = field(default_factory=tokens)
    outputs: Layout = field(default_factory=tokens)
    weights: Mapping[str, Layout | Fused] = field(default_factory=dict)
