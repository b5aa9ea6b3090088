# SPDX-License-Identifier: MIT
"""One layer of each kind against the whole model: the same collectives, and the same decisions."""

import json
from collections import Counter

import pytest

from tests.checkpoints import FAMILIES
from tokenspeed.planner.catalog import PlannedModel, describe, open_model
from tokenspeed.planner.devices import DEVICES
from tokenspeed.planner.estimate import Load, estimate
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.mesh import Mesh

H200 = DEVICES["h200"]


def tiny(family: str, name: str, **changes: object) -> PlannedModel:
    config = FAMILIES[family](architectures=[name], **changes)
    return describe(family, json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize(
    ("planned", "kept"),
    [
        (tiny("deepseek_v3", "DeepseekV3ForCausalLM", num_hidden_layers=6), (0, 1, 2)),
        (
            tiny("qwen3_moe", "Qwen3MoeForCausalLM", num_hidden_layers=7, mlp_only_layers=[1, 3]),
            (0, 1, 2, 5),
        ),
        (
            tiny("qwen3_moe", "Qwen3MoeForCausalLM", num_hidden_layers=5, mlp_only_layers=[2, 4]),
            (0, 1, 2, 3, 4),
        ),
        (tiny("qwen3", "Qwen3ForCausalLM", num_hidden_layers=5), (0, 1)),
        (tiny("qwen3", "Qwen3ForCausalLM", num_hidden_layers=1), (0,)),
    ],
    ids=["dense first", "dense between", "dense last", "alike", "one"],
)
def test_layers_of_one_kind_are_one(planned: PlannedModel, kept: tuple[int, ...]) -> None:
    folded = planned.folded
    assert folded.kept == kept
    layers = planned.model.model.layers
    for layer, place in enumerate(folded.stands_for):
        other = layers[folded.kept[place]]
        shapes = [[tuple(p.shape) for p in x.parameters()] for x in (layers[layer], other)]
        assert shapes[0] == shapes[1]
    assert len(layers) == len(folded.stands_for)  # the whole model is as it was


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "qwen3"])
@pytest.mark.parametrize("text", ["tp=4", "dp=2,tp=2", "tp=2,pp=3", "dp=2,tp=2,ep=4", "ep=4,pp=2"])
def test_a_whole_compile_finds_the_same_collectives(family: str, text: str) -> None:
    name = {"deepseek_v3": "DeepseekV3", "qwen3_moe": "Qwen3Moe", "qwen3": "Qwen3"}[family]
    planned, mesh = tiny(family, name + "ForCausalLM", num_hidden_layers=6), Mesh.parse(text)
    if family == "qwen3" and mesh.ep > 1:
        with pytest.raises(ValueError, match="no experts"):
            estimate(planned, mesh, H200, Load(context=64))
        return
    found = estimate(planned, mesh, H200, Load(context=64)).workload
    for index, variant in enumerate(found.plan.variants):
        whole = compile_model(planned.model, mesh, variant=variant)
        expected = Counter(
            (row.kind, row.axis, row.num_ranks, row.bytes_per_row, row.rows, row.fused)
            for row in whole.collectives(0)
        )
        folded: Counter[tuple[object, ...]] = Counter()
        for exchange in found.collectives[index]:
            row = exchange.row
            key = (row.kind, row.axis, row.num_ranks, row.bytes_per_row, row.rows, row.fused)
            folded[key] += sum(exchange.counts)
        assert folded == expected


@pytest.mark.parametrize("mesh", [Mesh(tp=8, ep=8), Mesh(dp=4, tp=2, ep=8), Mesh(dp=8)], ids=str)
def test_a_whole_compile_decides_the_same(mesh: Mesh) -> None:
    planned = open_model("kimi-k2.6")
    found = estimate(planned, mesh, H200, Load()).workload.plan
    whole = compile_model(
        planned.model,
        mesh,
        interconnect=H200.interconnect(tuple(range(mesh.stage_ranks))),
        memory_bandwidth=H200.bytes_per_s(),
    )
    assert found.variants == whole.variants
    assert found.buckets == whole.buckets
