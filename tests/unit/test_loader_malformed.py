# SPDX-License-Identifier: MIT
"""Malformed checkpoints: each is a `ModelLoadError` that says what is wrong, before allocation."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tokenspeed.errors import ModelLoadError
from tokenspeed.models.checkpoint import INDEX, SINGLE, Checkpoint
from tokenspeed.models.safetensors_header import read_header


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: object, end: object, shape: object = (1,), dtype: object = "F32") -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "short": (b"\x05\x00\x00", "truncated"),
    "header beyond the file": (file_of({}, length=100), "does not fit"),
    "header of 2^63 bytes": (file_of({}, length=2**63), "does not fit"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "malformed header"),
    "not JSON": (file_of(b"{,}"), "malformed header"),
    "not an object": (file_of([1]), "not a JSON object"),
    "deep": (file_of(b"[" * 100_000), "malformed header"),
    "duplicate": (
        file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', bytes(4)),
        "'a' stands there twice",
    ),
    "entry is no object": (file_of({"a": 3}), "must have dtype"),
    "key missing": (file_of({"a": {"dtype": "F32", "shape": [1]}}), "must have dtype"),
    "unknown dtype": (file_of({"a": tensor(0, 4, dtype="F31")}, bytes(4)), "unknown dtype 'F31'"),
    "dtype is a list": (file_of({"a": tensor(0, 4, dtype=[])}, bytes(4)), "unknown dtype"),
    "negative size": (file_of({"a": tensor(0, 4, shape=[-1])}, bytes(4)), "shape must be"),
    "shape is a word": (file_of({"a": tensor(0, 4, shape="x")}, bytes(4)), "shape must be"),
    "end before begin": (file_of({"a": tensor(4, 0)}, bytes(4)), "data_offsets must be"),
    "float offset": (file_of({"a": tensor(0, 4.0)}, bytes(4)), "data_offsets must be"),
    "shape does not fit": (file_of({"a": tensor(0, 4, shape=[2])}, bytes(4)), "does not take 4"),
    "huge shape": (file_of({"a": tensor(0, 4, shape=[2**62, 2**62])}, bytes(4)), "does not take"),
    "truncated data": (file_of({"a": tensor(0, 4)}, bytes(3)), "3 bytes of data"),
    "spare data": (file_of({"a": tensor(0, 4)}, bytes(5)), "5 bytes of data"),
    "overlap": (
        file_of({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
        "'b' overlaps",
    ),
    "gap": (file_of({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "'b' leaves a gap"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file(name: str, tmp_path: Path) -> None:
    content, message = MALFORMED[name]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        Checkpoint(tmp_path)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_damaged_byte_is_seen_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A header with one byte changed is refused, or still describes tiles of the same data."""
    good = file_of({"a": tensor(0, 8, [2]), "b": tensor(8, 12)}, bytes(12))
    at = data.draw(st.integers(0, len(good) - 13))
    bad = bytearray(good)
    bad[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(bad))
    try:
        entries = read_header(path)
    except ModelLoadError:
        return
    assert sum(entry.end - entry.begin for entry in entries.values()) == 12


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards, an index, and a file beside the folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.ones(2)}, folder / "one.safetensors")
    save_file({"y": torch.ones(3)}, folder / "two.safetensors")
    save_file({"y": torch.ones(3)}, tmp_path / "outside.safetensors")
    write_index(folder, {"x": "one.safetensors", "y": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_good_index_reads_all(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    pieces = {name: checkpoint.piece(name, (slice(None),)) for name in ("x", "y")}
    tensors = {name: tensor.tolist() for name, tensor in checkpoint.stream(pieces)}
    assert tensors == {"x": [1.0, 1.0], "y": [1.0, 1.0, 1.0]}


def test_a_file_that_shrinks_or_goes_while_it_is_read(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    piece = checkpoint.piece("y", (slice(1, 3),))
    size = (sharded / "two.safetensors").stat().st_size
    os.truncate(sharded / "two.safetensors", size - 4)
    with pytest.raises(ModelLoadError, match=rf"'y' \[1:3\]: the file ends at byte {size - 4}"):
        checkpoint.read("y", piece)
    (sharded / "two.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"two\.safetensors: .*No such file"):
        checkpoint.read("y", piece)


def test_a_dtype_that_no_weight_has(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.bool)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ModelLoadError, match="x: dtype BOOL cannot be read"):
        checkpoint.read("x", checkpoint.piece("x", (slice(None),)))


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("three.safetensors", "three.safetensors is missing"),
        ("../outside.safetensors", "is not the name of a file in this folder"),
        ("/etc/passwd", "is not the name of a file in this folder"),
        ("..", "is not the name of a file in this folder"),
        ("", "is not the name of a file in this folder"),
        ("a\\b", "is not the name of a file in this folder"),
        ("a\0b", "is not the name of a file in this folder"),
        ("one.safetensors", "one.safetensors lacks tensor 'y'"),
        (7, "must name a file"),
        (None, "must name a file"),
    ],
)
def test_a_bad_index_entry(sharded: Path, shard: object, message: str) -> None:
    write_index(sharded, {"x": "one.safetensors", "y": shard})
    with pytest.raises(ModelLoadError, match=message):
        Checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_a_bad_weight_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(ModelLoadError, match="weight_map must be"):
        Checkpoint(sharded)


def test_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    save_file({"y": torch.ones(3), "z": torch.ones(1)}, sharded / "two.safetensors")
    with pytest.raises(ModelLoadError, match=r"holds tensor 'z', which .* does not list"):
        Checkpoint(sharded)


def test_a_link_out_of_the_folder(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    (sharded / "two.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    with pytest.raises(ModelLoadError, match=r"two\.safetensors is a link out of this folder"):
        Checkpoint(sharded)


def test_links_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file({"x": torch.ones(2)}, blobs / "0f")
    os.symlink("../../blobs/0f", folder / SINGLE)
    checkpoint = Checkpoint(folder)
    assert checkpoint.read("x", checkpoint.piece("x", (slice(None),))).tolist() == [1.0, 1.0]


def damage_json(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_json("{"), "not valid JSON"),
        (damage_json("[]"), "must be a JSON object"),
        (damage_json("[" * 100_000), "not valid JSON"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff"), "not valid JSON"),
        (lambda folder: (folder / INDEX).unlink(), "holds neither"),
        (lambda folder: (folder / "one.safetensors").write_bytes(b"junk"), "truncated"),
    ],
)
def test_a_damaged_folder(sharded: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(sharded)
    with pytest.raises(ModelLoadError, match=message):
        Checkpoint(sharded)
