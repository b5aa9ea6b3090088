# SPDX-License-Identifier: MIT
"""What one rank's load did, in bytes. Knows no files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenspeed.models.piece import Piece


@dataclass(frozen=True)
class Place:
    """Which of how many ranks loads; its errors and its report say so."""

    rank: int = 0
    num_ranks: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.num_ranks}"


ONE_RANK = Place()


@dataclass(frozen=True)
class LoadReport:
    """What one rank's load did. Bytes are those of tensor data in the files, scales included."""

    place: Place
    num_tensors: int  # of the model, read by this rank or not
    num_bytes_total: int  # of these tensors
    num_bytes: int  # read by this rank
    num_bytes_picked: int  # of those read, what it needs; the rest lies between pieces of rows
    num_bytes_whole: int  # of those it needs, in modules of which this rank needs all
    num_bytes_touched: int  # of the pages that hold what it needs: storage delivers no less
    set_aside: tuple[str, ...]  # known tensors that this model does not use

    def __str__(self) -> str:
        if self.place.num_ranks == 1:
            return f"read {_size(self.num_bytes)}"
        read = f"{self.place} read {_size(self.num_bytes)} of {_size(self.num_bytes_total)}"
        return f"{read}, {_size(self.num_bytes_whole)} of it in modules that it holds whole"


def _size(num_bytes: int) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
    return f"{num_bytes / unit:.2f} {name}"


def make_report(
    place: Place,
    modules: Iterable[Iterable[str]],
    weights: Mapping[str, Piece],
    scales: Mapping[str, Piece],
    num_bytes_read: int,
    set_aside: tuple[str, ...],
) -> LoadReport:
    """`modules` are the names of each module's weights; `scales` go by these names too."""
    picked = {name: piece.num_bytes for name, piece in weights.items()}
    for name, piece in scales.items():
        picked[name] += piece.num_bytes
    pieces = [*weights.values(), *scales.values()]
    whole = [names for names in modules if all(weights[name].is_whole for name in names)]
    return LoadReport(
        place,
        num_tensors=len(weights),
        num_bytes_total=sum(piece.entry.num_bytes for piece in pieces),
        num_bytes=num_bytes_read,
        num_bytes_picked=sum(picked.values()),
        num_bytes_whole=sum(picked[name] for names in whole for name in names),
        num_bytes_touched=sum(piece.num_bytes_touched() for piece in pieces),
        set_aside=set_aside,
    )
