# SPDX-License-Identifier: MIT
"""MiniMax M2: the release's spelling of config.json, its tensor names, its MTP layers, FP8."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from tests.unit.test_loader import assert_same_parameters, edit_config
from tokenspeed.models.build import build_model, load_model, load_with_report
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import REPLICATED, ModuleSpec, Partial, Shard, tokens

pytestmark = pytest.mark.usefixtures("plain_weights")

CPU = torch.device("cpu")
ROWS = {"tp": Shard(0)}


def as_released(folder: Path) -> None:
    """Rewrites config.json with the release's keys in place of the newer ones."""
    edit_config(
        folder,
        rope_parameters=None,
        rope_theta=5000000,
        rotary_dim=8,
        attn_type_list=[1, 1, 1],
        qk_norm_type="per_layer",
        scoring_func="sigmoid",
        shared_intermediate_size=0,
        use_qk_norm=True,
        use_routing_bias=True,
        num_mtp_modules=3,
        mtp_transformer_layers=1,
    )


def test_both_spellings_build_the_same_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "minimax_m2")
    newer = load_model(tmp_path, None, CPU)
    as_released(tmp_path)
    older = load_model(tmp_path, None, CPU)
    assert_same_parameters(older, newer)
    for model in (newer, older):
        attention = model.get_submodule("model.layers.0.self_attn")
        assert attention.cos_sin.shape == (512, 8)
    assert torch.equal(
        older.get_submodule("model.layers.0.self_attn").cos_sin,
        newer.get_submodule("model.layers.0.self_attn").cos_sin,
    )


def test_names_of_the_release(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "minimax_m2")
    tensors = load_file(tmp_path / "model.safetensors")
    mlp = load_model(tmp_path, None, CPU).get_submodule("model.layers.2.mlp")
    at = "model.layers.2.block_sparse_moe"
    assert torch.equal(mlp.get_parameter("gate.bias"), tensors[f"{at}.e_score_correction_bias"])
    gate, up, down = (tensors[f"{at}.experts.5.{w}.weight"] for w in ("w1", "w3", "w2"))
    assert torch.equal(mlp.get_parameter("experts.w13")[5], torch.cat([gate, up]))
    assert torch.equal(mlp.get_parameter("experts.w2")[5], down)


def test_mtp_layers_are_set_aside(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "minimax_m2")
    as_released(tmp_path)
    path = tmp_path / "model.safetensors"
    extra = {f"model.layers.{3 + i}.eh_proj.weight": torch.zeros(2) for i in range(3)}
    save_file(load_file(path) | extra, path)
    assert load_with_report(tmp_path, None, CPU)[1].set_aside == tuple(extra)


def test_the_release_at_its_real_size(tmp_path: Path) -> None:
    """On the meta device, from config.json alone."""
    sizes = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "quantization_config": {
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    as_released(tmp_path)
    edit_config(tmp_path, rotary_dim=64, attn_type_list=[1] * 62)
    model, names = build_model(tmp_path, None, CPU, max_model_len=64)
    assert names.fp8_block == (128, 128)
    attention = 3072 * 128 * (48 + 8 + 8 + 48) + 128 * (48 + 8)
    experts = 256 * (3 * 3072 * 1536 + 3072 + 1)
    layers = 62 * (attention + experts + 2 * 3072)
    total = layers + 2 * 200064 * 3072 + 3072
    assert sum(p.numel() for p in model.parameters()) == total
    assert round(total / 1e9) == 229
    assert model.get_parameter("model.layers.61.self_attn.qk_norm.q_weight").shape == (6144,)


@pytest.mark.parametrize(
    ("path", "spec", "message"),
    [
        (
            "qk_mean_square",
            ModuleSpec("mean_square", tokens(tp=Shard(1)), tokens()),
            r"qk_mean_square .*axis tp: it sees some of the features: its output is P",
        ),
        (
            "qk_mean_square",
            ModuleSpec("mean_square", tokens(tp=Partial()), tokens(tp=Partial())),
            r"qk_mean_square .*axis tp: it sees whole tokens: needs its input R",
        ),
        (
            "qk_norm",
            ModuleSpec("scale", tokens(), tokens(), {"q_weight": ROWS, "k_weight": ROWS}),
            r"qk_norm .*axis tp: its q_weight is divided by features: its output is S",
        ),
        (
            "qk_norm",
            ModuleSpec("scale", tokens(), tokens(), {"q_weight": REPLICATED, "k_weight": ROWS}),
            r"qk_norm .*axis tp: its k_weight is divided by features: its output is S",
        ),
    ],
)
def test_a_wrong_annotation_of_the_norm_is_refused(
    tmp_path: Path, path: str, spec: ModuleSpec, message: str
) -> None:
    make_checkpoint(tmp_path, "minimax_m2")
    model = build_model(tmp_path, None, CPU)[0]
    model.get_submodule(f"model.layers.1.self_attn.{path}").spec = spec
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\." + message):
        compile_model(model, Mesh(tp=2))


def test_its_norm_sums_two_numbers_a_token(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "minimax_m2")
    plan = compile_model(build_model(tmp_path, None, CPU)[0], Mesh(tp=2))
    rows = [row for row in plan.collectives(0, itemsize=4) if row.module.endswith("qk_norm")]
    assert [row.module for row in rows] == [f"model.layers.{i}.self_attn.qk_norm" for i in range(3)]
    assert {(row.kind, row.axis, row.bytes_per_row) for row in rows} == {("all_reduce", "tp", 8)}
