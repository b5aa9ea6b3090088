# SPDX-License-Identifier: MIT
"""The compile: what it inserts, how weights divide, and which meshes are refused."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.meta_model import build
from tokenspeed.layers.layer import Layer
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.spmd.collectives import Collective, Variant
from tokenspeed.spmd.compile import compile_model, cuts
from tokenspeed.spmd.cost import Interconnect
from tokenspeed.spmd.localise import localise
from tokenspeed.spmd.mesh import Mesh

PACKAGE = Path(__file__).resolve().parents[2] / "tokenspeed"


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
