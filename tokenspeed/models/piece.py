# SPDX-License-Identifier: MIT
"""`Piece`: the part of a checkpoint tensor that a rank reads, and where its bytes stand.

A tensor is row-major: a piece of whole rows is one run of bytes, a piece of columns one run a row.

    shape (4, 8), pick [1:3, 2:5]      row 1   . . x x x . . .      2 runs of 3 elements,
                                       row 2   . . x x x . . .      8 elements apart

Reads no file and knows no mesh.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tokenspeed.models.safetensors_header import TensorEntry

PAGE_BYTES = 4096  # what storage delivers at least


@dataclass(frozen=True)
class Runs:
    """`count` runs of `size` bytes; the first is at byte `offset`, the others `stride` apart."""

    offset: int
    count: int
    size: int
    stride: int

    @property
    def span(self) -> int:
        """Bytes from the first run's begin to the last one's end."""
        return (self.count - 1) * self.stride + self.size


@dataclass(frozen=True)
class Piece:
    """Elements [begin[d], end[d]) along each dimension d of a tensor; possibly none."""

    entry: TensorEntry
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, entry: TensorEntry, pick: tuple[slice, ...] | None) -> "Piece":
        """`pick` slices the leading dimensions with step 1; None picks nothing."""
        if pick is None:
            return cls(entry, (0,) * len(entry.shape), (0,) * len(entry.shape))
        if len(pick) > len(entry.shape):
            raise IndexError(f"{len(pick)} slices for a tensor of shape {entry.shape}")
        whole = (slice(None),) * (len(entry.shape) - len(pick))
        ranges = [
            range(size)[part] for size, part in zip(entry.shape, (*pick, *whole), strict=True)
        ]
        if any(r.step != 1 for r in ranges):
            raise IndexError(f"a pick must have steps of 1: {pick}")
        return cls(entry, tuple(r.start for r in ranges), tuple(r.stop for r in ranges))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(max(e - b, 0) for b, e in zip(self.begin, self.end, strict=True))

    @property
    def is_whole(self) -> bool:
        return self.shape == self.entry.shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.entry.item_bytes

    def __str__(self) -> str:
        return f"[{', '.join(f'{b}:{e}' for b, e in zip(self.begin, self.end, strict=True))}]"

    def runs(self) -> Iterator[Runs]:
        """The piece's bytes, in the order of its elements; `offset` counts from the file's begin.

        Only the last dimension that is cut breaks runs; the one before it gives their stride.
        """
        if not self.num_bytes:
            return
        full = self.entry.shape
        cuts = [d for d, size in enumerate(self.shape) if size != full[d]]
        inner = cuts[-1] if cuts else 0
        row_bytes = self.entry.item_bytes * math.prod(full[inner + 1 :])
        size = row_bytes * math.prod(self.shape[inner : inner + 1])
        strides = [self.entry.item_bytes * math.prod(full[d + 1 :]) for d in range(len(full))]
        first = self.entry.begin + sum(b * s for b, s in zip(self.begin, strides, strict=True))
        if inner == 0:
            yield Runs(first, 1, size, size)
            return
        rows, outer = inner - 1, range(inner - 1)
        steps = (range(0, self.shape[d] * strides[d], strides[d]) for d in outer)
        for step in itertools.product(*steps):
            yield Runs(first + sum(step), self.shape[rows], size, strides[rows])

    def num_bytes_touched(self) -> int:
        """Bytes of the file's pages that hold any of the piece: what storage has to deliver."""
        pages, last = 0, -1
        for runs in self.runs():
            if runs.stride - runs.size < PAGE_BYTES:  # no page lies between two runs
                begins = [(runs.offset, runs.span)]
            else:
                begins = [(runs.offset + i * runs.stride, runs.size) for i in range(runs.count)]
            for begin, size in begins:
                first, end = max(begin // PAGE_BYTES, last + 1), (begin + size - 1) // PAGE_BYTES
                pages, last = pages + end - first + 1, end
        return pages * PAGE_BYTES
