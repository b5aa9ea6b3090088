# SPDX-License-Identifier: MIT
"""config.json as an untrusted form, rope against transformers, names to folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.checkpoints import FAMILIES
from tokenspeed.errors import ModelLoadError
from tokenspeed.layers.rope import inverse_frequencies, rope_table
from tokenspeed.models.build import load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.decoder_config import read_decoder
from tokenspeed.models.hf_config import HfConfig, eos_token_ids
from tokenspeed.models.registry import ARCHITECTURES, find_architecture

CPU = torch.device("cpu")
CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def values_of(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model; a change to `...` drops the key."""
    values = json.loads(FAMILIES[family]().to_json_string(use_diff=False)) | changes
    return {key: value for key, value in values.items() if value is not ...}


def build(family: str, max_model_len: int | None = None, **changes: Any) -> CausalLM:
    architecture = find_architecture(CLASSES[family])
    values = values_of(family, **changes)
    return architecture.model.from_config(values, torch.float32, CPU, max_model_len)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_specs_and_sizes(family: str) -> None:
    model = build(family, max_model_len=100)
    shapes = {
        "deepseek_v2": ((40,),),
        "deepseek_v3": ((40,),),
        "qwen2": ((2, 16), (2, 16)),
        "qwen3": ((2, 32), (2, 32)),
        "qwen3_moe": ((2, 16), (2, 16)),
        "minimax_m2": ((2, 16), (2, 16)),
        "llama": ((2, 16), (2, 16)),
    }
    assert [spec.shapes for spec in model.cache_specs()] == [shapes[family]] * 3
    assert model.cache_specs(torch.bfloat16)[0].dtype == torch.bfloat16
    assert (model.vocab_size, model.max_position) == (512, 100)
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": ...}, "hidden_size: is missing"),
    ("llama", {"hidden_size": None}, "hidden_size: is missing"),
    ("llama", {"hidden_size": "64"}, "hidden_size: must be an integer, is '64'"),
    ("llama", {"hidden_size": True}, "hidden_size: must be an integer, is True"),
    ("llama", {"hidden_size": 0}, "hidden_size: must be in"),
    ("llama", {"hidden_size": 10**30}, "hidden_size: must be in"),
    ("llama", {"num_hidden_layers": -1}, "num_hidden_layers: must be in"),
    ("llama", {"vocab_size": []}, "vocab_size: must be an integer"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; supported: silu"),
    ("llama", {"hidden_act": {}}, "hidden_act: {} is not supported"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: must be a finite number"),
    ("llama", {"rms_norm_eps": -1}, "rms_norm_eps: must be a finite number above"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 4"),
    ("llama", {"head_dim": 15}, "head_dim: rotary embedding needs an even size"),
    ("llama", {"head_dim": 2**24}, "max_position_embeddings: 512 are too many"),
    ("llama", {"max_position_embeddings": 2**24, "head_dim": 64}, f"{2**24} are too many"),
    ("llama", {"head_dim": ..., "hidden_size": 66}, "num_attention_heads: 4 does not divide"),
    ("llama", {"sliding_window": 128}, "sliding_window: sliding-window attention"),
    ("llama", {"rope_parameters": []}, "rope_parameters: must be an object"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor: is missing"),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1}},
        "rope_theta: must be a finite number above 1",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 of a head is not"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types: only full_attention"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok: more than 8"),
    ("qwen3_moe", {"mlp_only_layers": ["x"]}, "mlp_only_layers: must hold non-negative"),
    ("minimax_m2", {"num_experts_per_tok": 9}, "num_experts_per_tok: more than 8"),
    ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type: 'per_head' is not supported"),
    ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm: only true"),
    ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list: only full attention"),
    ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported"),
    ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias: only true"),
    ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size: shared experts"),
    ("minimax_m2", {"rotary_dim": 17}, "rotary_dim: must be in [1, 16]"),
    ("minimax_m2", {"rotary_dim": 12}, "partial_rotary_factor: 0.5 of a head is not supported"),
    ("deepseek_v3", {"topk_method": "magic"}, "topk_method: 'magic' is not supported"),
    ("deepseek_v3", {"scoring_func": "tanh"}, "scoring_func: 'tanh' is not supported"),
    ("deepseek_v3", {"n_group": 5}, "n_group: 5 does not divide 16"),
    ("deepseek_v3", {"n_group": 16}, "n_group: groups need at least 2"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group: more than n_group 4"),
    ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok: more than the experts"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads: must be"),
    ("deepseek_v3", {"first_k_dense_replace": ...}, "first_k_dense_replace: is missing"),
    (
        "deepseek_v2",
        {"norm_topk_prob": True, "routed_scaling_factor": 2.0},
        "norm_topk_prob: true with softmax",
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_a_wrong_configuration_names_the_key(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError) as error:
        build(family, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: "),
        ({"architectures": []}, "architectures: must be a list of one name"),
        ({"architectures": "x"}, "architectures: must be a list of one name"),
        ({"text_config": 3}, "text_config: must be an object"),
        ({"dtype": "int8"}, "dtype: 'int8' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: 'gptq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size: must be two"),
        ({"quantization_config": "fp8"}, "quantization_config: must be an object"),
    ],
)
def test_a_wrong_frame_names_the_key(outer: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values_of("llama") | base | outer))
    with pytest.raises(ModelLoadError) as error:
        load_model(tmp_path, None, CPU)
    assert message in str(error.value)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), st.integers(), max_size=2),
)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_junk_in_any_key_is_a_typed_error_or_harmless(
    family: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """There are no weights in the folder, so that a harmless change ends in that error."""
    values = values_of(family, architectures=[CLASSES[family]])
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3)):
        values[key] = data.draw(JUNK)
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelLoadError):
        load_model(folder, None, CPU)


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    values = values_of("llama", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ModelLoadError, match="architectures"):
        load_model(tmp_path, None, CPU)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="max_model_len 513 is more than the 512 positions"):
        build("qwen3", max_model_len=513)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert build("qwen3", rope_parameters=yarn).max_position == 2048
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert build("qwen3", rope_parameters=dynamic).max_position == 512


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "beta_fast": 24,
        "beta_slow": 2,
    },
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "attention_factor": 1.25,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: str(r["rope_type"]))
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "type"])
def test_rope_equals_transformers(rope: dict[str, Any], style: str) -> None:
    theta, dim, length = 10_000_000.0, 64, 131072
    values = values_of("llama", max_position_embeddings=length, rope_parameters=...)
    if style == "rope_parameters":
        values[style] = rope | {"rope_theta": theta}
    else:
        kind = {"type": rope["rope_type"]}
        legacy = {key: value for key, value in rope.items() if key != "rope_type"} | kind
        values |= {"rope_theta": theta, "rope_scaling": rope if style == "rope_scaling" else legacy}
    config = read_decoder(HfConfig(values), rope_dim=dim, max_model_len=None).rope
    oracle = PretrainedConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=length,
        rope_parameters=rope | {"rope_theta": theta},
    )
    frequencies, scale = 1.0 / theta ** (torch.arange(0, dim, 2) / dim), 1.0
    if rope["rope_type"] != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](oracle, CPU)
    torch.testing.assert_close(inverse_frequencies(config), frequencies, rtol=1e-6, atol=0)
    table = rope_table(config, 100, CPU)
    assert table.shape == (100, dim)
    angles = torch.arange(100.0)[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], -1) * scale
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-5)


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert eos_token_ids(tmp_path) == [7]
    generation.write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert eos_token_ids(tmp_path) == [8, 9]
    generation.write_text(json.dumps({"eos_token_id": [-1]}))
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: eos_token_id"):
        eos_token_ids(tmp_path)


def test_every_architecture_is_named_by_its_class() -> None:
    for name, found in ARCHITECTURES.items():
        assert found.prefix or found.model.__name__ == name


def test_the_guide_shows_a_whole_model() -> None:
    root = Path(__file__).parents[2]
    file = (root / "tokenspeed" / "models" / "qwen2.py").read_text()
    assert f"```python\n{file}```" in (root / "docs" / "adding-a-model.md").read_text()
    assert len(file.splitlines()) <= 120
