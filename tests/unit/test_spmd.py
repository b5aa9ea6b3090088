# SPDX-License-Identifier: MIT
"""The compile: what it inserts, and that a wrong annotation is refused by the module's name."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoints import FAMILIES
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.mlp import MLP
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import find_architecture
from tokenspeed.spmd.collectives import Collective, Variant
from tokenspeed.spmd.compile import compile_model, cuts
from tokenspeed.spmd.cost import Interconnect
from tokenspeed.spmd.localise import localise
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import (
    REPLICATED,
    Fused,
    Inline,
    ModuleSpec,
    Part,
    Partial,
    Shard,
    tokens,
)

TARGET = Target(torch.device("cpu"), torch.float32)
PACKAGE = Path(__file__).resolve().parents[2] / "tokenspeed"


def build(family: str, **changes: Any) -> CausalLM:
    values = json.loads(FAMILIES[family](architectures=[], **changes).to_json_string(False))
    name = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "qwen3_moe": "Qwen3Moe"}
    model = find_architecture(name.get(family, family.capitalize()) + "ForCausalLM").model
    return model.from_config(values, TARGET.dtype, TARGET.device)


def test_one_rank_moves_nothing() -> None:
    for family in ("deepseek_v3", "qwen3"):
        plan = compile_model(build(family), Mesh())
        assert not plan.sites
        assert plan.collectives(0) == []


def test_a_dense_model_gets_what_tensor_parallelism_needs() -> None:
    rows = compile_model(build("qwen3"), Mesh(tp=2), variant=Variant()).collectives(0, itemsize=4)
    # Embedding, attention and feed-forward of each of 3 layers, then the logits; nothing else.
    assert Counter(row.kind for row in rows) == {"all_reduce": 7, "all_gather": 1}
    assert {row.bytes_per_row for row in rows if row.kind == "all_reduce"} == {64 * 4}
    assert all(row.fused == "add + norm" for row in rows if row.kind == "all_reduce")
    (gather,) = (row for row in rows if row.kind == "all_gather")
    assert gather == Collective("lm_head", "all_gather", "tp", 2, 512 * 4, "sampled")


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v2", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=4, ep=4)], ids=str)
def test_never_more_than_megatron_style(family: str, mesh: Mesh) -> None:
    """Two all-reduces a layer, one for the embedding, a gather of the logits. arXiv:1909.08053."""
    model = build(family)
    if mesh.ep > 1 and not any(m.spec.kind == "router" for m in layers_of(model)):
        mesh = replace(mesh, ep=1)
    rows = compile_model(model, mesh, variant=Variant()).collectives(0, itemsize=2)
    layers, hidden = model.config.num_layers, model.config.hidden_size
    assert Counter(row.kind for row in rows) == {"all_reduce": 2 * layers + 1, "all_gather": 1}
    num_bytes = sum(row.bytes_per_row for row in rows if row.rows == "tokens")
    assert num_bytes == (2 * layers + 1) * hidden * 2


def layers_of(model: CausalLM) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer)]


def test_a_split_stream_scatters_and_gathers() -> None:
    plan = compile_model(build("llama"), Mesh(tp=2), variant=Variant(split=True))
    kinds = Counter(row.kind for row in plan.collectives(0) if row.module != "lm_head")
    assert kinds == {"reduce_scatter": 7, "all_gather": 7}


def test_experts_and_attention_use_their_own_axes() -> None:
    plan = compile_model(build("deepseek_v3"), Mesh(dp=2, tp=2, ep=4), variant=Variant())
    rows = plan.collectives(0)
    experts = [(r.kind, r.axis) for r in rows if r.module == "model.layers.1.mlp.experts"]
    assert experts == [("all_gather", "dp"), ("reduce_scatter", "dp")]
    norms = {r.axis for r in rows if r.module.endswith("layernorm")}
    assert norms == {"tp"}
    dispatch = compile_model(
        build("deepseek_v3"), Mesh(dp=2, tp=2, ep=4), variant=Variant(dispatch=True)
    )
    kinds = [r.kind for r in dispatch.collectives(0) if r.module.endswith("1.mlp.experts")]
    assert kinds == ["all_to_all", "all_to_all"]


def test_the_cost_model_splits_long_steps_only() -> None:
    slow = Interconnect(latency_s=1e-5, bandwidth=1e10)
    plan = compile_model(
        build("qwen3"), Mesh(tp=4), interconnect=slow, memory_bandwidth=1e10, max_tokens=65536
    )
    assert not plan.variants[plan.variant_for(1)].split
    assert plan.variants[plan.variant_for(65536)].split
    assert list(plan.buckets) == sorted(plan.buckets)
    assert plan.buckets[-1] == 65536


def test_stages_divide_layers_and_what_follows_them() -> None:
    stages = compile_model(build("llama"), Mesh(pp=2)).stages
    assert stages.bounds == (0, 2, 3)
    places = {
        path: stages.stage_of(path)
        for path in ("model.embed_tokens", "model.layers.1.mlp", "model.norm", "lm_head")
    }
    assert list(places.values()) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="4 stages for 3 layers"):
        compile_model(build("llama"), Mesh(pp=4))


def test_local_shapes_divide_every_weight_once() -> None:
    model = build("qwen3", num_attention_heads=8)
    plan = compile_model(model, Mesh(tp=4))
    local = [cuts(model, plan, rank) for rank in range(4)]
    # 8 query heads of 32 over 4 ranks; 2 key-value heads, each on two of them.
    assert local[0]["model.layers.0.self_attn.qkv_proj.weight"].shape == (64 + 32 + 32, 64)
    first, second = (local[r]["model.layers.0.self_attn.qkv_proj.weight"] for r in (0, 1))
    assert [part.start for part in first.dims[0]] == [0, 0, 0]
    assert [part.start for part in second.dims[0]] == [64, 0, 0]
    assert local[0]["model.layers.0.mlp.down_proj.weight"].shape == (64, 24)
    assert local[0]["model.norm.weight"].shape == (64,)


@pytest.mark.parametrize(
    ("mesh", "family", "message"),
    [
        (Mesh(tp=3), "qwen3", "qkv_proj: 2 key-value heads and 3 ranks of tp"),
        (Mesh(tp=8), "qwen3", r"qkv_proj.weight: .* 4 heads of 32 cannot be .* over 8 ranks of tp"),
        (Mesh(tp=8), "deepseek_v3", r"q_proj.weight: .* 4 heads of 24 .* 8 ranks of tp"),
        (Mesh(ep=3), "qwen3_moe", "experts: 8 experts cannot be divided over 3 ranks of ep"),
        (Mesh(ep=2), "qwen3", "mesh ep 2: the model has no experts"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh: Mesh, family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_model(build(family), mesh)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2,tp=4", "axis tp is named twice"),
        ("xp=2", "unknown axis 'xp'"),
        ("tp=two", "needs a number"),
        ("tp=0", "at least one rank"),
        ("tp=2,ep=3", "cannot be views of the same ranks"),
        ("cp=2", "cp: no layer"),
    ],
)
def test_a_mesh_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh.parse(text)


def test_a_communicator_of_another_size_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="mesh tp 2 needs 2 ranks, there are 1"):
        localise(model, compile_model(model, Mesh(tp=2)), 0, None)


Plant = Callable[[CausalLM], None]
ATTENTION, DENSE, SPARSE = (f"model.layers.{at}" for at in ("0.self_attn", "0.mlp", "1.mlp"))


def spec(path: str, **fields: Any) -> Plant:
    """Changes fields of one module's spec."""

    def plant(model: CausalLM) -> None:
        module = model.get_submodule(path)
        old = module.spec
        assert isinstance(old, ModuleSpec)
        module.spec = replace(old, **fields)

    return plant


def weights(path: str, **changes: Any) -> Plant:
    """Changes the placement of some of one module's weights; None takes it away."""

    def plant(model: CausalLM) -> None:
        module = model.get_submodule(path)
        old = module.spec
        assert isinstance(old, ModuleSpec)
        kept: Mapping[str, Any] = {**old.weights, **changes}
        module.spec = replace(old, weights={n: w for n, w in kept.items() if w is not None})

    return plant


def flows(path: str, *chains: tuple[Any, ...]) -> Plant:
    def plant(model: CausalLM) -> None:
        model.get_submodule(path).flows = chains

    return plant


def halves(first: Any, second: Any) -> Fused:
    return Fused(0, (Part(96, first), Part(96, second)))


def add_child(model: CausalLM) -> None:
    model.get_submodule(DENSE).add_module("extra", MLP(TARGET, 8, 16))


ROWS, COLUMNS = {"tp": Shard(0)}, {"tp": Shard(1)}
SILU = Inline("silu_mul", "elementwise")
MISTAKES: dict[str, tuple[Plant, str]] = {
    "missing reduce after attention": (
        spec(f"{ATTENTION}.o_proj", outputs=tokens()),
        rf"{ATTENTION}.o_proj .*axis tp: .* its output is Partial.*declares Replicate",
    ),
    "missing reduce after the embedding": (
        spec("model.embed_tokens", outputs=tokens()),
        r"model.embed_tokens .*axis tp: its vocabulary is divided: its output is Partial",
    ),
    "missing reduce after the experts": (
        spec(f"{SPARSE}.experts", outputs=tokens()),
        rf"{SPARSE}.experts .*: its experts are divided: its output is Partial",
    ),
    "double reduce: a whole block declares a sum": (
        weights(f"{DENSE}.down_proj", weight=REPLICATED),
        rf"{DENSE}.down_proj .*axis tp: its weight is whole: needs its input",
    ),
    "double reduce: the block's output is summed already": (
        spec(DENSE, outputs=tokens()),
        r"model.layers.0 \(output\): has Replicate\(\) on tp but needs Partial",
    ),
    "wrong dimension of a weight": (
        weights(f"{DENSE}.down_proj", weight=ROWS),
        rf"{DENSE}.down_proj .*axis tp: its weight is divided by output features",
    ),
    "a dimension that the weight has not": (
        weights(f"{DENSE}.down_proj", weight={"tp": Shard(2)}),
        rf"{DENSE}.down_proj .*axis tp: weight cannot be Shard\(dim=2\)",
    ),
    "wrong dimension of an output": (
        spec(f"{ATTENTION}.o_proj", outputs=tokens(tp=Shard(1))),
        rf"{ATTENTION}.o_proj .*axis tp: .* its output is Partial.*declares Shard\(dim=1\)",
    ),
    "wrong axis of a weight": (
        weights(f"{ATTENTION}.o_proj", weight={"ep": Shard(1)}),
        rf"{ATTENTION}.o_proj .*axis (tp|dp)",
    ),
    "wrong axis all through a module": (
        spec(
            f"{ATTENTION}.o_proj",
            inputs={"ep": Shard(1)},
            outputs={"ep": Partial()},
            weights={"weight": {"ep": Shard(1)}, "bias": {"ep": Partial()}},
        ),
        rf"{ATTENTION}.kv_b_proj -> {ATTENTION}.o_proj: .*; an outer axis divides dimension 1",
    ),
    "an axis that does not exist": (
        spec(f"{DENSE}.gate_up_proj", outputs=tokens(xp=Shard(1))),
        rf"{DENSE}.gate_up_proj: unknown mesh axis 'xp'",
    ),
    "two axes over the same ranks": (
        spec(f"{DENSE}.gate_up_proj", outputs={"tp": Shard(1), "ep": Partial()}),
        rf"{DENSE}.gate_up_proj: Partial\(sum\) on ep contradicts",
    ),
    "no placement at all": (
        spec(f"{DENSE}.gate_up_proj", outputs=tokens(tp=1)),
        rf"{DENSE}.gate_up_proj: unknown placement 1 on axis tp",
    ),
    "a maximum where a sum is meant": (
        spec(f"{DENSE}.down_proj", outputs=tokens(tp=Partial("max"))),
        rf"{DENSE}.down_proj: only sums can be partial",
    ),
    "forgotten gather at the logits": (
        spec("", outputs=tokens(tp=Shard(1))),
        r"model: its outputs are Shard\(dim=1\) on tp, and the sampler needs Replicate",
    ),
    "logits of another rank's tokens": (
        spec("", outputs=REPLICATED),
        r"model: its outputs are Replicate\(\) on dp, and the sampler needs Shard\(dim=0\)",
    ),
    "half of a fused weight not divided": (
        weights(f"{DENSE}.gate_up_proj", weight=halves(ROWS, REPLICATED)),
        rf"{DENSE}.gate_up_proj.weight: part 1 is .* fused parts are divided alike",
    ),
    "a sum through a nonlinearity": (
        spec(
            f"{DENSE}.gate_up_proj",
            inputs=tokens(tp=Shard(1)),
            outputs=tokens(tp=Partial()),
            weights={"weight": COLUMNS},
        ),
        rf"{DENSE}.gate_up_proj -> {DENSE}.silu_mul: has Partial.*elementwise",
    ),
    "a bias added by every rank": (
        weights(f"{ATTENTION}.o_proj", bias=REPLICATED),
        rf"{ATTENTION}.o_proj .*axis tp: its bias must be Partial",
    ),
    "a norm over divided features": (
        spec("model.norm", inputs=tokens(tp=Shard(1)), outputs=tokens(tp=Shard(1))),
        r"model.norm .*axis tp: it norms whole tokens: needs its input",
    ),
    "a norm of a sum": (
        spec("model.norm", inputs=tokens(tp=Partial())),
        r"model.norm .*axis tp: it norms whole tokens",
    ),
    "a norm with a divided weight": (
        weights("model.norm", weight=ROWS),
        r"model.norm .*axis tp: its weight must be whole",
    ),
    "a router that sees some experts": (
        weights(f"{SPARSE}.gate", weight={"ep": Shard(0)}),
        rf"{SPARSE}.gate .*: its weight must be whole",
    ),
    "experts divided in one weight only": (
        weights(f"{SPARSE}.experts", w2=REPLICATED),
        rf"{SPARSE}.experts .*do not fit together",
    ),
    "experts of another rank's tokens": (
        spec(f"{SPARSE}.experts", inputs=tokens()),
        rf"{SPARSE}.experts .*axis (dp|ep): its experts are divided: needs its input Replicate",
    ),
    "heads divided, their weights whole": (
        weights(f"{ATTENTION}.kv_b_proj", w_uk=REPLICATED),
        rf"{ATTENTION}.kv_b_proj .*axis tp: its w_uk is whole",
    ),
    "a latent cache in pieces": (
        spec(
            f"{ATTENTION}.kv_a_layernorm", inputs=tokens(tp=Shard(0)), outputs=tokens(tp=Shard(0))
        ),
        rf"{ATTENTION}.kv_a_layernorm -> {ATTENTION}.latent_cache: has Shard\(dim=0\) on tp",
    ),
    "a parameter without a placement": (
        weights(f"{DENSE}.gate_up_proj", weight=None),
        rf"{DENSE}.gate_up_proj: parameter weight has no placement",
    ),
    "a child that no flow names": (
        add_child,
        rf"{DENSE}: child extra stands in none of its flows",
    ),
    "a flow that names no child": (
        flows(DENSE, ("gate_up_proj", SILU, "down_proj"), ("up_proj",)),
        rf"{DENSE}: its flows name up_proj, which it has not",
    ),
    "a kind without a rule": (
        spec("model.norm", kind="layer_norm"),
        r"model.norm: unknown kind 'layer_norm'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2, tp=2, ep=4)], ids=str)
def test_a_planted_mistake_is_refused(name: str, mesh: Mesh) -> None:
    plant, message = MISTAKES[name]
    model = build("deepseek_v3", attention_bias=True)
    compile_model(model, mesh)
    plant(model)
    with pytest.raises(ValueError, match=message):
        compile_model(model, mesh)


def test_a_tied_head_is_divided_as_the_embedding() -> None:
    model = build("qwen3", tie_word_embeddings=True)
    spec("model.embed_tokens", weights={"weight": COLUMNS}, outputs=tokens(tp=Shard(1)))(model)
    model.lm_head.spec = replace(model.lm_head.spec, weights=model.model.embed_tokens.spec.weights)
    with pytest.raises(ValueError, match=r"lm_head .*axis tp: its weight is divided by input"):
        compile_model(model, Mesh())


def test_a_module_without_a_spec_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model \(Linear\) declares no ModuleSpec"):
        compile_model(nn.Linear(2, 2), Mesh())


def test_a_composite_with_parameters_is_refused() -> None:
    mlp = MLP(TARGET, 8, 16)
    mlp.own_parameter("scale", (8,))
    with pytest.raises(ValueError, match=r"a composite has parameters of its own: \['scale'\]"):
        compile_model(mlp, Mesh())


@pytest.mark.parametrize("folder", ["models", "layers"])
def test_no_author_names_a_collective(folder: str) -> None:
    words = re.compile(
        r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast\(|torch\.distributed(?!\.tensor)"
        r"|\bgroup\.|\.send\(|\.receive\(",
        re.IGNORECASE,
    )
    for path in sorted((PACKAGE / folder).glob("*.py")):
        found = words.search(path.read_text())
        assert found is None, f"{path.name} names {found[0] if found else ''}"
