# SPDX-License-Identifier: MIT
"""A folder of safetensors, single or sharded, as one mapping from names to tensors.

All headers are checked when it is opened; of tensors only the asked pieces are read, one by one,
with `pread`: what is not asked for costs no memory, and a file that shrinks is an error and not a
signal. Knows no model.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from tokenspeed.errors import ModelLoadError
from tokenspeed.models.hf_config import read_json
from tokenspeed.models.piece import Piece, Runs
from tokenspeed.models.safetensors_header import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MERGE_GAP = 1024  # bytes: copying fewer costs less than another system call
WINDOW_BYTES = 1 << 20  # read at once where runs are merged
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}


class Checkpoint:
    """Opens `folder`. `ModelLoadError`: a file is missing, malformed, or outside the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self.num_bytes_read = 0  # of tensors, merged gaps included
        if (folder / SINGLE).exists():
            self.entries = read_header(_inside(folder, SINGLE))
        elif (folder / INDEX).exists():
            self._read_index()
        else:
            raise ModelLoadError(f"{folder}: holds neither {SINGLE} nor {INDEX}")

    def _read_index(self) -> None:
        index = self.folder / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index}: weight_map must be an object and not empty")
        shards: dict[Any, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise ModelLoadError(f"{index}: {name}: must name a file, is {shard!r}")
            shards.setdefault(shard, set()).add(name)
        for shard, names in shards.items():
            entries = read_header(_inside(self.folder, shard))
            for name in sorted(names ^ entries.keys()):
                has = "holds" if name in entries else "lacks"
                lists = "does not list" if name in entries else "lists"
                raise ModelLoadError(f"{shard} {has} tensor {name!r}, which {index} {lists}")
            self.entries.update(entries)

    def piece(self, name: str, pick: tuple[slice, ...] | None) -> Piece:
        """The part `pick` of a tensor; None picks nothing."""
        return Piece.of(self.entries[name], pick)

    def stream(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pieces that are not empty, in the order in which their tensors stand on disk.

        All share one buffer: use a piece before taking the next.
        """
        chosen = sorted(
            (name for name, piece in pieces.items() if piece.num_bytes),
            key=lambda name: (pieces[name].entry.file, pieces[name].entry.begin),
        )
        largest = max((pieces[name].num_bytes for name in chosen), default=0)
        buffer = torch.empty(largest, dtype=torch.uint8)
        by_file = itertools.groupby(chosen, key=lambda name: pieces[name].entry.file)
        for path, names in by_file:
            with _open(path) as file:
                for name in names:
                    yield name, self._read(file, name, pieces[name], buffer)

    def read(self, name: str, piece: Piece) -> torch.Tensor:
        """One piece in memory of its own, for small ones that are needed out of order."""
        with _open(piece.entry.file) as file:
            return self._read(file, name, piece, torch.empty(piece.num_bytes, dtype=torch.uint8))

    def _read(self, file: FileIO, name: str, piece: Piece, buffer: torch.Tensor) -> torch.Tensor:
        if piece.entry.dtype not in DTYPES:
            raise ModelLoadError(f"{name}: dtype {piece.entry.dtype} cannot be read")
        out, filled = buffer[: piece.num_bytes], 0
        try:
            for runs in piece.runs():
                part = out[filled : filled + runs.count * runs.size]
                self.num_bytes_read += read_runs(file.fileno(), runs, part)
                filled += part.numel()
        except OSError as error:
            raise ModelLoadError(f"{file.name}: tensor {name!r} {piece}: {error}") from error
        return out.view(DTYPES[piece.entry.dtype]).view(piece.shape)


def read_runs(file: int, runs: Runs, out: torch.Tensor) -> int:
    """Fills out [count * size] uint8 with the runs, one after the other; returns the bytes read.

    Runs that stand closer than `MERGE_GAP` are read together with what lies between them.
    """
    if runs.count == 1 or runs.stride - runs.size > MERGE_GAP:
        view = out.numpy().data
        for i in range(runs.count):
            _pread(file, view[i * runs.size : (i + 1) * runs.size], runs.offset + i * runs.stride)
        return runs.count * runs.size
    rows = max(WINDOW_BYTES // runs.stride, 1)
    window = torch.empty(rows * runs.stride, dtype=torch.uint8)
    view, total = window.numpy().data, 0
    for start in range(0, runs.count, rows):
        part = out.view(runs.count, runs.size)[start : start + rows]
        span = (len(part) - 1) * runs.stride + runs.size
        _pread(file, view[:span], runs.offset + start * runs.stride)
        part.copy_(window.view(rows, runs.stride)[: len(part), : runs.size])
        total += span
    return total


def _pread(file: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise OSError(f"the file ends at byte {offset}")
        view, offset = view[count:], offset + count


def _open(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except OSError as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; refuses paths and links that lead out of it.

    Links into the blobs of the hub's own cache (models--x/{snapshots/revision,blobs}) are allowed.
    """
    path = folder / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ModelLoadError(f"{folder}: {name!r} is not the name of a file in this folder")
    if not path.is_file():
        raise ModelLoadError(f"{folder}: {name} is missing; download the model again")
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    in_hub_cache = home.parent.name == "snapshots" and target.is_relative_to(blobs)
    if target.parent != home and not in_hub_cache:
        raise ModelLoadError(f"{folder}: {name} is a link out of this folder")
    return path
