# SPDX-License-Identifier: MIT
"""A folder of safetensors, single or sharded, as one mapping from names to tensors.

All headers are checked when it is opened; tensors are read one by one. Knows no model.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from tokenspeed.errors import ModelLoadError
from tokenspeed.models.hf_config import read_json
from tokenspeed.models.safetensors_header import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_MAPPED_BYTES = 64 << 20  # how much of a mapped file may become resident before it is closed


class Checkpoint:
    """Opens `folder`. `ModelLoadError`: a file is missing, malformed, or outside the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
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

    def stream(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors in the order in which they stand on disk; at most one is held at a time.

        A tensor may be a view of the mapped file: use it before taking the next.
        """
        chosen = sorted(names, key=lambda n: (self.entries[n].file, self.entries[n].begin))
        with ExitStack() as stack:
            opened: Path | None = None
            mapped = 0
            for name in chosen:
                entry = self.entries[name]
                if entry.file != opened or mapped > MAX_MAPPED_BYTES:
                    stack.close()
                    handle = stack.enter_context(_open(entry.file))
                    opened, mapped = entry.file, 0
                mapped += entry.end - entry.begin
                yield name, _get(handle, name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, for small ones that are needed out of order."""
        with _open(self.entries[name].file) as handle:
            return _get(handle, name).clone()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _get(handle: Any, name: str) -> torch.Tensor:
    try:
        return cast(torch.Tensor, handle.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"tensor {name!r}: {error}") from error


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
