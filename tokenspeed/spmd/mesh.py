# SPDX-License-Identifier: MIT
"""`Mesh`: the named axes over the ranks, and which ranks share what. Knows no tensors.

A pipeline stage has `stage_ranks` ranks. Attention sees them as dp x tp, experts as ep x etp; both
are views of the same ranks, cut at different strides. The cuts of all views together give the
*atoms*: each axis is a run of neighbouring atoms, so a layout on any axis is a layout on atoms.

    tp 4, ep 2 on 4 ranks    strides 1 and 4 (tp), 2 and 4 (ep): atoms 2 x 2
    rank                     0     1     2     3
    tp   = both atoms        0     1     2     3
    ep   = the outer atom    0     0     1     1
    etp  = the inner atom    0     1     0     1

Where ep is larger than dp x tp, the outermost ranks repeat attention. `kv` is the outer part of tp
that divides key-value heads when there are fewer of them than tensor-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

AXES = ("pp", "dp", "tp", "kv", "ep", "etp")


@dataclass(frozen=True)
class Mesh:
    """Ranks per axis: tensor, expert, data (attention), pipeline, context parallel.

    `ValueError` says which sizes do not fit together.
    """

    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    cp: int = 1
    kv: int | None = None  # None: tp

    def __post_init__(self) -> None:
        for axis in ("tp", "ep", "dp", "pp", "cp", "kv"):
            size = getattr(self, axis)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
                raise ValueError(f"mesh axis {axis} must have a whole number of ranks: {size!r}")
            if size is not None and size < 1:
                raise ValueError(f"mesh axis {axis} must have at least one rank: {size}")
        if self.cp != 1:
            raise ValueError(f"mesh axis cp: no layer divides one sequence over ranks yet: {self}")
        whole = self.stage_ranks % self.ep == 0 and self.stage_ranks % (self.dp * self.tp) == 0
        for inner, outer in pairwise(self._strides):
            if not whole or outer % inner:
                raise ValueError(
                    f"mesh {self}: dp x tp = {self.dp * self.tp} ranks of attention and "
                    f"ep = {self.ep} ranks of experts cannot be views of the same ranks: "
                    "one must divide the other, and their strides too"
                )

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """From "tp=4,ep=2". `ValueError`: an unknown axis, one named twice, or a bad size."""
        sizes: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, size = item.partition("=")
            if name in sizes:
                raise ValueError(f"mesh {text!r}: axis {name} is named twice")
            if name not in ("tp", "ep", "dp", "pp", "cp"):
                raise ValueError(f"mesh {text!r}: unknown axis {name!r}; axes: tp, ep, dp, pp, cp")
            if not size.isdecimal():
                raise ValueError(f"mesh {text!r}: axis {name} needs a number of ranks")
            sizes[name] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = {axis: getattr(self, axis) for axis in ("dp", "tp", "ep", "pp")}
        return " x ".join(f"{a} {n}" for a, n in sizes.items() if n > 1) or "one rank"

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return max(self.dp * self.tp, self.ep)

    @property
    def num_ranks(self) -> int:
        return self.pp * self.stage_ranks

    @property
    def etp(self) -> int:
        """Ranks that share each expert."""
        return self.stage_ranks // self.ep

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        """Where views cut a stage's ranks, from 1 up to `stage_ranks`."""
        cuts = {1, self.tp, self.tp * self.dp, self.etp, self.stage_ranks}
        if self.kv is not None:
            if self.tp % self.kv:
                raise ValueError(f"mesh axis kv: {self.kv} does not divide tp {self.tp}")
            cuts.add(self.tp // self.kv)
        return tuple(sorted(cuts))

    @cached_property
    def atoms(self) -> tuple[int, ...]:
        """Sizes of the atoms, outermost first; their product is `stage_ranks`."""
        return tuple(outer // inner for inner, outer in pairwise(self._strides))[::-1]

    def axis_atoms(self, axis: str) -> tuple[int, ...]:
        """Which atoms make up an axis, outermost first. `pp` has none: it divides layers."""
        return self._axes[axis]

    @cached_property
    def _axes(self) -> dict[str, tuple[int, ...]]:
        kv = self.tp // (self.kv or self.tp)
        spans = {
            "dp": (self.tp, self.tp * self.dp),
            "tp": (1, self.tp),
            "kv": (kv, self.tp),
            "ep": (self.etp, self.stage_ranks),
            "etp": (1, self.etp),
        }
        inner = self._strides[-2::-1]  # of each atom
        return {
            axis: tuple(i for i, stride in enumerate(inner) if low <= stride < high)
            for axis, (low, high) in spans.items()
        }

    @property
    def same_tokens(self) -> tuple[int, ...]:
        """The atoms over which ranks of one stage have the same tokens: all but those of dp."""
        dp = self.axis_atoms("dp")
        return tuple(atom for atom in range(len(self.atoms)) if atom not in dp)

    def size(self, axis: str) -> int:
        """Ranks of an axis."""
        return self.tp if axis == "kv" and self.kv is None else int(getattr(self, axis))

    def index(self, axis: str, rank: int) -> int:
        """The rank's place on an axis."""
        if axis == "pp":
            return rank // self.stage_ranks
        return self.atoms_index(self.axis_atoms(axis), rank)

    def atoms_index(self, atoms: Sequence[int], rank: int) -> int:
        """The rank's place among the ranks that differ in these atoms only."""
        place = 0
        for atom in atoms:
            place = place * self.atoms[atom] + self._digit(atom, rank)
        return place

    def groups(self, atoms: Sequence[int]) -> list[tuple[int, ...]]:
        """Every set of ranks that differ in these atoms only, each in the order of its places."""
        found: dict[tuple[int, ...], list[int]] = {}
        rest = [atom for atom in range(len(self.atoms)) if atom not in atoms]
        for rank in range(self.num_ranks):
            key = (self.index("pp", rank), *(self._digit(atom, rank) for atom in rest))
            found.setdefault(key, []).append(rank)
        return [
            tuple(sorted(ranks, key=lambda rank: self.atoms_index(atoms, rank)))
            for ranks in found.values()
        ]

    def _digit(self, atom: int, rank: int) -> int:
        stride = self._strides[::-1][atom + 1]
        return rank % self.stage_ranks // stride % self.atoms[atom]
