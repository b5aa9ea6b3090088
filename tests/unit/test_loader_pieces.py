# SPDX-License-Identifier: MIT
"""Pieces of tensors: their elements, and the bytes read for them by the kernel's own count."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoints import FAMILIES, make_checkpoint
from tokenspeed.models.checkpoint import MERGE_GAP, SINGLE, Checkpoint
from tokenspeed.models.piece import PAGE_BYTES, Piece

pytestmark = pytest.mark.usefixtures("plain_weights")

Pick = tuple[slice, ...]


def bytes_read_by_this_process() -> int:
    """All that `read` and its kin have returned, as Linux counts it."""
    line = Path("/proc/self/io").read_text().splitlines()[0]
    return int(line.removeprefix("rchar:"))


def read_counted(checkpoint: Checkpoint, name: str, pick: Pick | None) -> tuple[torch.Tensor, int]:
    """A piece, and the bytes that the process read for it; the checkpoint must agree."""
    piece = checkpoint.piece(name, pick)
    own, earlier = checkpoint.num_bytes_read, bytes_read_by_this_process()
    before = bytes_read_by_this_process()
    tensor = checkpoint.read(name, piece)
    count = bytes_read_by_this_process() - before - (before - earlier)
    # To look is to read too, a few digits more or fewer.
    assert abs(count - (checkpoint.num_bytes_read - own)) < 64
    return tensor, checkpoint.num_bytes_read - own


def quarters(shape: tuple[int, ...], dim: int, index: int) -> Pick:
    """The index-th quarter along `dim`, as a tensor-parallel rank has it."""
    step = shape[dim] // 4
    cut = slice(index * step, (index + 1) * step)
    return tuple(cut if d == dim else slice(None) for d in range(len(shape)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A matrix whose quarters of columns stand further apart than `MERGE_GAP`, and a narrow one."""
    folder = tmp_path_factory.mktemp("wide")
    tensors = {
        "matrix": torch.randn(96, 4096).bfloat16(),
        "narrow": torch.randn(512, 64).bfloat16(),
        "stack": torch.randn(4, 8, 2048),
    }
    save_file(tensors, folder / SINGLE)
    return Checkpoint(folder)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("index", range(4))
def test_a_quarter_takes_a_quarter_of_the_bytes(wide: Checkpoint, dim: int, index: int) -> None:
    whole = load_file(wide.folder / SINGLE)["matrix"]
    pick = quarters((96, 4096), dim, index)
    tensor, count = read_counted(wide, "matrix", pick)
    assert torch.equal(tensor, whole[pick])
    assert count == whole.nbytes // 4


def test_narrow_rows_are_read_with_their_gaps(wide: Checkpoint) -> None:
    whole = load_file(wide.folder / SINGLE)["narrow"]
    pick = quarters((512, 64), 1, 1)
    tensor, count = read_counted(wide, "narrow", pick)
    assert torch.equal(tensor, whole[pick])
    assert MERGE_GAP >= 64 * 2 * 3 // 4
    assert count == whole.nbytes - 64 * 2 * 3 // 4  # all but the last gap


def test_merged_runs_longer_than_a_window(tmp_path: Path) -> None:
    whole = torch.arange(3 << 18, dtype=torch.float32).view(-1, 64)  # 3 MiB
    save_file({"x": whole}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    tensor, _ = read_counted(checkpoint, "x", (slice(5, None), slice(48, 60)))
    assert torch.equal(tensor, whole[5:, 48:60])


def test_a_piece_of_a_stack(wide: Checkpoint) -> None:
    whole = load_file(wide.folder / SINGLE)["stack"]
    pick = (slice(1, 3), slice(2, 8, 1), slice(1024, 1536))
    tensor, count = read_counted(wide, "stack", pick)
    assert torch.equal(tensor, whole[pick])
    assert count == 2 * 6 * 512 * 4


def test_nothing_is_read_for_nothing(wide: Checkpoint) -> None:
    assert read_counted(wide, "matrix", None)[1] == 0
    assert read_counted(wide, "matrix", (slice(3, 3),))[1] == 0
    assert list(wide.stream({"matrix": wide.piece("matrix", None)})) == []


@pytest.mark.parametrize("pick", [(slice(0, 8, 2),), (slice(None, None, -1),), (slice(1),) * 3])
def test_picks_that_are_no_box(wide: Checkpoint, pick: Pick) -> None:
    with pytest.raises(IndexError):
        wide.piece("matrix", pick)


def pages_of(piece: Piece, names: torch.Tensor) -> int:
    """Brute force: `names` holds each element's index in the tensor."""
    pages = set()
    for index in names[tuple(map(slice, piece.begin, piece.end))].flatten().tolist():
        first = piece.entry.begin + index * piece.entry.item_bytes
        pages |= {first // PAGE_BYTES, (first + piece.entry.item_bytes - 1) // PAGE_BYTES}
    return len(pages) * PAGE_BYTES


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_of_any_tensor(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 7, 40, 1500]), max_size=4), label="shape")
    if math.prod(shape) > 200_000:
        shape = shape[:1]
    folder = tmp_path_factory.getbasetemp()
    names = torch.arange(math.prod(shape), dtype=torch.int32)
    save_file({"x": names.view(torch.float32).view(shape)}, folder / SINGLE)
    checkpoint, cuts = Checkpoint(folder), []
    for size in shape:
        begin = data.draw(st.integers(0, size))
        cuts.append(slice(begin, data.draw(st.integers(begin, size))))
    pick = tuple(cuts)
    tensor, count = read_counted(checkpoint, "x", pick)
    assert torch.equal(tensor.view(torch.int32), names.view(shape)[pick])
    piece = checkpoint.piece("x", pick)
    assert piece.num_bytes == tensor.nbytes <= count <= names.nbytes
    assert piece.num_bytes_touched() == pages_of(piece, names.view(shape))


PATTERNS = ("whole", "rows", "columns", "both", "none")


def pick_of(shape: tuple[int, ...], pattern: str) -> Pick | None:
    if pattern == "none":
        return None
    halves = [slice(size // 2, None) for size in shape]
    keep = {"whole": (), "rows": (0,), "columns": (len(shape) - 1,), "both": range(len(shape))}
    return tuple(h if d in keep[pattern] else slice(None) for d, h in enumerate(halves))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_pattern(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, max_shard_size="100KB")
    checkpoint = Checkpoint(tmp_path)
    whole = {n: t for f in tmp_path.glob("*.safetensors") for n, t in load_file(f).items()}
    for pattern in PATTERNS:
        picks = {name: pick_of(entry.shape, pattern) for name, entry in checkpoint.entries.items()}
        pieces = {name: checkpoint.piece(name, pick) for name, pick in picks.items()}
        seen = set()
        for name, tensor in checkpoint.stream(pieces):
            assert torch.equal(tensor, whole[name][picks[name] or ()]), name
            seen.add(name)
        assert seen == (set() if pattern == "none" else whole.keys())
