# SPDX-License-Identifier: MIT
"""Checks a safetensors header before anything trusts it. Reads no tensor data.

    | u64 header length | JSON header | tensor data, without gaps, to the end of the file |

Source: the safetensors format, https://huggingface.co/docs/safetensors.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.errors import ModelLoadError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, in its bytes [begin, end)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name. `ModelLoadError` says what is malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelLoadError(
                    f"{path}: truncated or not safetensors: a header of {length} bytes "
                    f"does not fit in a file of {size}"
                )
            text = file.read(length)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: malformed header: {error}") from error
    if not isinstance(header, dict):
        raise ModelLoadError(f"{path}: malformed header: not a JSON object")
    header.pop("__metadata__", None)
    data = 8 + length
    entries = {name: _entry(path, name, value, data) for name, value in header.items()}
    _check_layout(path, entries, data, size)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands there twice")
    return found


def _natural_numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value
    )


def _entry(path: Path, name: str, value: object, data: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelLoadError(f"{where}: must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelLoadError(f"{where}: unknown dtype {dtype!r}")
    if not _natural_numbers(shape):
        raise ModelLoadError(f"{where}: shape must be a list of sizes, is {shape!r}")
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ModelLoadError(f"{where}: data_offsets must be [begin, end], is {offsets!r}")
    begin, end = offsets
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise ModelLoadError(f"{where}: {dtype} of shape {shape} does not take {end - begin} bytes")
    return TensorEntry(path, dtype, tuple(shape), data + begin, data + end)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data: int, size: int) -> None:
    """Tensors must tile bytes [data, size): no overlap, no gap, no missing or spare bytes."""
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a gap"
            raise ModelLoadError(f"{path}: tensor {name!r} {what} at byte {entry.begin}")
        position = entry.end
    if position != size:
        has = f"{size - data} bytes of data where the header needs {position - data}"
        raise ModelLoadError(f"{path}: {has}")
