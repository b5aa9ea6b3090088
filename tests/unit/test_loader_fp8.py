# SPDX-License-Identifier: MIT
"""FP8 weights and their blocks' scales: dequantised exactly, whole or in pieces of whole blocks."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import make_checkpoint
from tests.unit.test_loader import (
    assert_same_parameters,
    checkpoint,
    edit_config,
    edit_tensors,
    folder,
    load,
)
from tokenspeed.errors import ModelLoadError
from tokenspeed.models.checkpoint import SINGLE, Checkpoint
from tokenspeed.models.loader import dequantize
from tokenspeed.models.tensor_check import SCALE_SUFFIX, pick_scales

pytestmark = pytest.mark.usefixtures("plain_weights")

__all__ = ["checkpoint", "folder"]  # fixtures
BLOCK = (32, 16)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Random scales per block, and the weight divided by them in float8."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True))
    scale = torch.rand(rows, columns) * 0.01 + 0.001
    spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return (weight / spread[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
def test_fp8_blocks_are_dequantised(tmp_path: Path, max_shard_size: str) -> None:
    torch.manual_seed(3)
    plain, fp8 = tmp_path / "plain", tmp_path / "fp8"
    make_checkpoint(plain, "deepseek_v3", max_shard_size=max_shard_size)
    shutil.copytree(plain, fp8)
    index = fp8 / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    for path in sorted(plain.glob("model*.safetensors")):
        tensors = load_file(path)
        small = dict(tensors)
        for name in tensors:
            if name.endswith("_proj.weight") and "layers.3" not in name:
                small[name], scale = quantize(tensors[name])
                small[name + "_scale_inv"] = scale
                weight_map[name + "_scale_inv"] = path.name
                tensors[name] = dequantize(small[name], scale, BLOCK, torch.float32)
        save_file(tensors, path)
        save_file(small, fp8 / path.name)
    if index.exists():
        index.write_text(json.dumps({"weight_map": weight_map}))
    edit_config(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": BLOCK})
    assert_same_parameters(load(fp8), load(plain))


def test_dequantize_is_exact_per_block() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    scale = torch.tensor([[2.0, 10.0], [0.5, 100.0]])
    out = dequantize(weight.to(torch.float8_e4m3fn), scale, (2, 2), torch.float32)
    assert out.tolist() == [[2.0, 4.0, 30.0], [8.0, 10.0, 60.0], [3.5, 4.0, 900.0]]


def test_fp8_without_scale_or_blocks_is_refused(folder: Path) -> None:
    name = "model__layers__0__mlp__up_proj__weight"
    edit_tensors(folder, **{name: torch.zeros(96, 64).to(torch.float8_e4m3fn)})
    with pytest.raises(ModelLoadError, match="weight_block_size"):
        load(folder)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": BLOCK})
    with pytest.raises(ModelLoadError, match=r"up_proj\.weight_scale_inv"):
        load(folder)
    edit_tensors(folder, **{name + "_scale_inv": torch.zeros(2, 4)})
    with pytest.raises(ModelLoadError, match=r"shape \(2, 4\), must be \(3, 4\)"):
        load(folder)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One FP8 weight of [150, 70]: the last row and the last column of blocks are cut short."""
    folder = tmp_path_factory.mktemp("ragged")
    weight, scale = quantize(torch.randn(150, 70))
    save_file({"w": weight, "w" + SCALE_SUFFIX: scale}, folder / SINGLE)
    return Checkpoint(folder)


def read_dequantised(checkpoint: Checkpoint, *pick: slice) -> Tensor:
    pieces = {"w": checkpoint.piece("w", pick)}
    scales = pick_scales(pieces, checkpoint, BLOCK)
    scale = checkpoint.read("w" + SCALE_SUFFIX, scales["w"])
    return dequantize(checkpoint.read("w", pieces["w"]), scale, BLOCK, torch.float32)


@pytest.mark.parametrize("rows", [slice(None), slice(32), slice(64, 128), slice(128, 150)])
@pytest.mark.parametrize("columns", [slice(None), slice(16, 48), slice(48, 70)])
def test_pieces_of_whole_blocks(ragged: Checkpoint, rows: slice, columns: slice) -> None:
    whole = read_dequantised(ragged, slice(None), slice(None))
    assert torch.equal(read_dequantised(ragged, rows, columns), whole[rows, columns])


def test_only_the_scales_of_the_piece_are_read(ragged: Checkpoint) -> None:
    before = ragged.num_bytes_read
    read_dequantised(ragged, slice(32, 64))
    assert ragged.num_bytes_read - before == 32 * 70 + 5 * 4


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ((slice(75),), "w: rows 0 to 75 of 150, divided over 2 ranks, are not whole FP8 blocks"),
        ((slice(16, 48),), "w: rows 16 to 48 of 150"),
        ((slice(32), slice(35, 70)), "w: columns 35 to 70 of 70, divided over 2 ranks"),
    ],
)
def test_a_cut_block_is_refused(ragged: Checkpoint, pick: tuple[slice, ...], message: str) -> None:
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        pick_scales({"w": ragged.piece("w", pick)}, ragged, BLOCK)


def test_a_rank_that_reads_nothing_of_a_weight(ragged: Checkpoint) -> None:
    scales = pick_scales({"w": ragged.piece("w", None)}, ragged, BLOCK)
    assert scales["w"].num_bytes == 0
