# SPDX-License-Identifier: MIT
"""Loading: sharded, MTP, casts, memory, progress, and names that do not fit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import make_checkpoint
from tokenspeed.errors import ModelLoadError
from tokenspeed.models.build import load_model, load_with_report
from tokenspeed.models.causal_lm import CausalLM

pytestmark = pytest.mark.usefixtures("plain_weights")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("v3"), "deepseek_v3")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def load(folder: Path) -> CausalLM:
    return load_model(folder, torch.float32, CPU)


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replaces, adds or (None) drops tensors; underscores double for dots."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_parameters(model: CausalLM, other: CausalLM) -> None:
    expected = dict(other.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name


def test_fused_parameters_hold_their_parts(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    attention = load(folder).get_submodule("model.layers.2.self_attn")
    prefix = "model.layers.2.self_attn."
    down = torch.cat(
        [tensors[prefix + n] for n in ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")]
    )
    assert torch.equal(attention.get_parameter("a_proj.weight"), down)
    both = tensors[prefix + "kv_b_proj.weight"].view(4, 32, 32)
    assert torch.equal(attention.get_parameter("kv_b_proj.w_uk"), both[:, :16].mT)
    assert torch.equal(attention.get_parameter("kv_b_proj.w_uv"), both[:, 16:])


def test_experts_are_stacked(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    experts = load(folder).get_submodule("model.layers.1.mlp.experts")
    for e in range(16):
        gate, up, down = (
            tensors[f"model.layers.1.mlp.experts.{e}.{p}_proj.weight"]
            for p in ("gate", "up", "down")
        )
        assert torch.equal(experts.get_parameter("w13")[e], torch.cat([gate, up]))
        assert torch.equal(experts.get_parameter("w2")[e], down)


def test_sharded_loads_like_single(checkpoint: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert_same_parameters(load(tmp_path), load(checkpoint))


def test_mtp_is_set_aside(checkpoint: Path, folder: Path) -> None:
    report = load_with_report(checkpoint, None, CPU)[1]
    assert len(report.set_aside) == 67  # a layer of experts, and how it is fed
    assert all(name.startswith("model.layers.3.") for name in report.set_aside)
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(ModelLoadError, match=r"no place for 67 tensor.*model\.layers\.3\.e"):
        load(folder)


def test_casts_to_the_asked_dtype(checkpoint: Path) -> None:
    wide, narrow = load(checkpoint), load_model(checkpoint, torch.bfloat16, CPU)
    routers = 0
    for name, parameter in narrow.named_parameters():
        router = ".gate." in name
        routers += router
        assert parameter.dtype == (torch.float32 if router else torch.bfloat16)
        assert torch.equal(parameter, wide.get_parameter(name).to(parameter.dtype))
    assert routers == 4


def test_progress_rises_to_one(checkpoint: Path) -> None:
    seen: list[float] = []
    load_model(checkpoint, None, CPU, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[0] > 0
    assert seen[-1] == 1.0


def test_names_and_shapes_that_do_not_fit(folder: Path) -> None:
    edit_tensors(folder, model__layers__0__mlp__strange=torch.zeros(1))
    with pytest.raises(ModelLoadError, match=r"no place for 1 tensor.*layers\.0\.mlp\.strange"):
        load(folder)
    edit_tensors(folder, model__layers__0__mlp__strange=None, model__norm__weight=None)
    with pytest.raises(ModelLoadError, match=r"lacks 1 tensor\(s\): model\.norm\.weight"):
        load(folder)
    edit_tensors(folder, model__norm__weight=torch.zeros(63))
    with pytest.raises(ModelLoadError, match=r"norm\.weight: shape \(63,\) .* needs \(64,\)"):
        load(folder)
    edit_tensors(folder, model__norm__weight=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(ModelLoadError, match=r"dtype I32 are not supported"):
        load(folder)


def test_a_tied_head_needs_no_tensor_and_ignores_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    edit_tensors(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(16))
    without = load(tmp_path)
    edit_tensors(tmp_path, lm_head__weight=torch.zeros(512, 64))
    assert_same_parameters(load(tmp_path), without)


def test_the_language_model_of_a_multimodal_checkpoint(checkpoint: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    nested = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    nested |= {"vision_tower.x": torch.zeros(1), "mm_projector.y": torch.zeros(1)}
    save_file(nested, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(outer))
    model, report = load_with_report(folder, torch.float32, CPU)
    assert_same_parameters(model, load(checkpoint))
    assert {"vision_tower.x", "mm_projector.y"} < set(report.set_aside)


PEAK = """
import resource, sys, torch
from pathlib import Path
from tokenspeed.models.build import load_model
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_model(Path(sys.argv[1]), torch.float32, torch.device("cpu"))  # warm every code path
before = peak()
model = load_model(Path(sys.argv[2]), torch.float32, torch.device("cpu"))
size = sum(p.numel() * p.itemsize for p in model.parameters())
largest = max(p.numel() * p.itemsize for p in model.parameters())
print(peak() - before, size, largest)
"""


def test_no_second_copy_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    big = {"vocab_size": 30000, "hidden_size": 512, "intermediate_size": 4096}
    make_checkpoint(tmp_path, "llama", num_hidden_layers=6, **big)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, checkpoint, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    grown, size, largest = map(int, done.stdout.split())
    # The bound: the model, one tensor, and the part of a file that may stay mapped.
    assert size > 250 << 20
    assert grown < size + largest + (96 << 20)
