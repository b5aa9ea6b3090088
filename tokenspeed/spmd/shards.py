# SPDX-License-Identifier: MIT
"""`Cut`: which piece of one weight a rank holds. Knows sizes and ranks, no tensors and no files.

Along each dimension a weight is a run of parts, each divided evenly over ranks of its own:

    whole     | q q q q | k k | v v |
    rank 1        | q q |   k |   v |     parts (4, 2 ranks, piece 1), (2, 2, 1), (2, 2, 1)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tokenspeed.spmd.layout import AtomLayout, on_atoms
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import Fused, Layout, Partial, Shard

Region = tuple[int | slice, ...]  # of a whole weight


@dataclass(frozen=True)
class PartCut:
    """Piece `index` of `count` equal ones of a part of `size`."""

    size: int
    count: int = 1
    index: int = 0

    @property
    def piece(self) -> int:
        return self.size // self.count

    @property
    def start(self) -> int:
        return self.piece * self.index


@dataclass(frozen=True)
class Cut:
    """One weight on one rank; `dims[d]` are the parts along dimension d."""

    dims: tuple[tuple[PartCut, ...], ...]
    absent: bool = False  # a summand that another rank holds

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Cut":
        return cls(tuple((PartCut(size),) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The local shape."""
        return tuple(sum(part.piece for part in parts) for parts in self.dims)

    @property
    def global_shape(self) -> tuple[int, ...]:
        return tuple(sum(part.size for part in parts) for parts in self.dims)

    def pick(self, region: Region) -> tuple[tuple[slice, ...], Region] | None:
        """What this rank takes of `region`: slices relative to it, and where they go locally.

        `region` indexes the whole weight and lies inside one part along every dimension, or takes
        the dimension whole. None if this rank has nothing of it.
        """
        if self.absent:
            return None
        taken: list[slice] = []
        local: list[int | slice] = []
        for at, parts in enumerate(self.dims):
            index = region[at] if at < len(region) else slice(None)
            found = _pick(parts, index)
            if found is None:
                return None
            low, high, to = found
            if isinstance(index, int):
                local.append(to)
            else:
                taken.append(slice(low, high))
                local.append(slice(to, to + high - low))
        return tuple(taken), tuple(local)


def _pick(parts: tuple[PartCut, ...], index: int | slice) -> tuple[int, int, int] | None:
    """(low, high) relative to the region, and where it goes; None for an empty intersection."""
    total = sum(part.size for part in parts)
    if isinstance(index, int):
        begin, end = index, index + 1
    else:
        begin, end, _ = index.indices(total)
    if (begin, end) == (0, total) and all(part.count == 1 for part in parts):
        return 0, total, 0
    offset = to = 0
    for part in parts:
        if offset <= begin and end <= offset + part.size:
            low = max(begin, offset + part.start)
            high = min(end, offset + part.start + part.piece)
            return (
                None if low >= high else (low - begin, high - begin, to + low - offset - part.start)
            )
        offset += part.size
        to += part.piece
    raise ValueError(f"[{begin}, {end}) crosses the parts {parts} that are divided on their own")


def cut_of(name: str, shape: Sequence[int], layout: Layout | Fused, mesh: Mesh, rank: int) -> Cut:
    """The rank's cut of a weight. `ValueError` names the weight that cannot be divided."""
    if not isinstance(layout, Fused):
        return _cut(name, tuple(shape), layout, mesh, rank, {})
    if sum(part.size for part in layout.parts) != shape[layout.dim]:
        sizes = [part.size for part in layout.parts]
        raise ValueError(f"{name}: parts {sizes} do not make up dimension {layout.dim} of {shape}")
    cuts = []
    for part in layout.parts:
        spread = tuple(part.size if d == layout.dim else size for d, size in enumerate(shape))
        cuts.append(_cut(name, spread, part.layout, mesh, rank, {layout.dim: part.unit}))
    dims = list(cuts[0].dims)
    dims[layout.dim] = tuple(cut.dims[layout.dim][0] for cut in cuts)
    return Cut(tuple(dims), cuts[0].absent)


def _cut(
    name: str,
    shape: tuple[int, ...],
    layout: Layout,
    mesh: Mesh,
    rank: int,
    units: Mapping[int, int],
) -> Cut:
    """`units[dim]`: a piece along dim is a whole number of so many."""
    placed = on_atoms(layout, mesh, name)
    beyond = [p for p in layout.values() if isinstance(p, Shard) and not 0 <= p.dim < len(shape)]
    if beyond:
        raise ValueError(f"{name}: {beyond[0]!r} does not divide shape {shape}")
    dims = []
    for dim, size in enumerate(shape):
        atoms = [a for a, placement in enumerate(placed) if placement == Shard(dim)]
        count, unit = prod(mesh.atoms[a] for a in atoms), units.get(dim, 1)
        if size % unit or size // unit % count:
            axes = ", ".join(axis for axis, p in layout.items() if p == Shard(dim))
            what = f"{size} is {size / unit:g} heads of {unit}" if unit > 1 else f"{size}"
            raise ValueError(
                f"{name}: dimension {dim} of {what} cannot be divided over {count} ranks of {axes}"
            )
        dims.append((PartCut(size, count, mesh.atoms_index(atoms, rank)),))
    return Cut(tuple(dims), _is_absent(placed, mesh, rank))


def _is_absent(placed: AtomLayout, mesh: Mesh, rank: int) -> bool:
    """A `Partial` weight is held by the first rank alone."""
    atoms = [a for a, placement in enumerate(placed) if isinstance(placement, Partial)]
    return mesh.atoms_index(atoms, rank) != 0
