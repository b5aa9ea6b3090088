# SPDX-License-Identifier: MIT
"""The compile: every model passes it, and wrong annotations are refused by name."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoints import FAMILIES
from tokenspeed.layers.layer import Target
from tokenspeed.layers.mlp import MLP
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import find_architecture
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.placement import Mesh, ModuleSpec, Partial, Replicate, Shard

TARGET = Target(torch.device("cpu"), torch.float32)


def build(family: str) -> CausalLM:
    values = json.loads(FAMILIES[family](architectures=[]).to_json_string(use_diff=False))
    name = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "qwen3_moe": "Qwen3Moe"}
    model = find_architecture(name.get(family, family.capitalize()) + "ForCausalLM").model
    return model.from_config(values, TARGET.dtype, TARGET.device)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_compiles(family: str) -> None:
    model = build(family)
    plan = compile_model(model, Mesh())
    assert plan.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_the_edges_of_a_dense_model_are_those_of_tensor_parallelism() -> None:
    edges = compile_model(build("qwen3"), Mesh()).edges
    # The embedding, then attention and feed-forward of each of 3 layers; nothing else moves.
    assert len(edges) == 7
    assert {(e.axis, e.have, e.need) for e in edges} == {("tp", Partial(), Replicate())}
    within = {(e.producer, e.consumer) for e in edges if e.producer.endswith("self_attn")}
    assert within == {
        (f"model.layers.{i}.self_attn", f"model.layers.{i}.post_attention_layernorm")
        for i in range(3)
    }


def test_experts_and_attention_use_their_own_axes() -> None:
    edges = compile_model(build("deepseek_v3"), Mesh()).edges
    assert {e.axis for e in edges if e.producer == "model.layers.1"} == {"ep"}
    assert {e.axis for e in edges if e.producer == "model.layers.1.self_attn"} == {"tp"}


def spoil(part: str, **spec: Any) -> MLP:
    mlp = MLP(TARGET, 8, 16)
    module = mlp.get_submodule(part)
    old = module.spec
    assert isinstance(old, ModuleSpec)
    fields = {"inputs": old.inputs, "outputs": old.outputs, "weights": old.weights} | spec
    module.spec = ModuleSpec(**fields)
    return mlp


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (spoil("down_proj", outputs={"tp": Shard(1)}), r"down_proj -> model \(output\): has Shard"),
        (spoil("down_proj", outputs={}), r"down_proj -> model .* needs Partial"),
        (spoil("gate_up_proj", outputs={"xp": Shard(1)}), "gate_up_proj: unknown mesh axis 'xp'"),
        (spoil("gate_up_proj", outputs={"tp": 1}), "gate_up_proj: unknown placement 1"),
        (spoil("gate_up_proj", weights={}), "gate_up_proj: parameter weight has no placement"),
        (
            spoil("gate_up_proj", weights={"weight": {"tp": Shard(2)}}),
            r"weight: .* does not divide",
        ),
    ],
)
def test_a_wrong_annotation_is_refused(model: MLP, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_model(model, Mesh())


def test_a_module_without_spec_or_flow_is_refused() -> None:
    mlp = MLP(TARGET, 8, 16)
    mlp.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="child extra stands in none of its flows"):
        compile_model(mlp, Mesh())
    with pytest.raises(ValueError, match=r"model \(Linear\) declares no ModuleSpec"):
        compile_model(nn.Linear(2, 2), Mesh())


def test_several_ranks_are_refused_in_this_release() -> None:
    with pytest.raises(ValueError, match="mesh axis ep must have one rank"):
        compile_model(MLP(TARGET, 8, 16), Mesh(ep=2))
