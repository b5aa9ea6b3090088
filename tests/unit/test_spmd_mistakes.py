# SPDX-License-Identifier: MIT
"""Wrong annotations, one of each kind: each is refused by the name of the module or the edge."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from tests.meta_model import TARGET, build
from tokenspeed.layers.layer import Layer
from tokenspeed.layers.mlp import MLP
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.spmd.check import spec_of
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.layout import moves, on_atoms
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
from tokenspeed.spmd.site import Site, check_sites

Plant = Callable[[CausalLM], None]
ATTENTION, DENSE, SPARSE = (f"model.layers.{at}" for at in ("0.self_attn", "0.mlp", "1.mlp"))


def spec(path: str, **fields: Any) -> Plant:
    """Changes fields of one module's spec."""

    def plant(model: CausalLM) -> None:
        module: Any = model.get_submodule(path)
        module.spec = replace(spec_of(path, module), **fields)

    return plant


def weights(path: str, **changes: Any) -> Plant:
    """Changes the placement of some of one module's weights; None takes it away."""

    def plant(model: CausalLM) -> None:
        module: Any = model.get_submodule(path)
        old = spec_of(path, module)
        kept: Mapping[str, Any] = {**old.weights, **changes}
        module.spec = replace(old, weights={n: w for n, w in kept.items() if w is not None})

    return plant


def flows(path: str, *chains: tuple[Any, ...]) -> Plant:
    def plant(model: CausalLM) -> None:
        module: Any = model.get_submodule(path)
        module.flows = chains

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
    "features with position that nobody sums": (
        spec(
            f"{ATTENTION}.a_proj",
            inputs=tokens(tp=Shard(1)),
            outputs=tokens(tp=Partial()),
            weights={"weight": COLUMNS, "bias": {"tp": Partial()}},
        ),
        rf"{ATTENTION}.a_proj -> {ATTENTION}.latent_cache: has Partial\(sum\) on tp",
    ),
    "a router of more tokens than its experts get": (
        spec(f"{SPARSE}.gate", inputs=REPLICATED, outputs=REPLICATED),
        rf"{SPARSE} \(input\) -> {SPARSE}.experts: {SPARSE}.experts also gets data from",
    ),
    "experts over another axis than ep": (
        spec(
            f"{SPARSE}.experts",
            outputs={"tp": Partial()},
            weights={"w13": {"tp": Shard(0)}, "w2": {"tp": Shard(0)}},
        ),
        rf"{SPARSE}.experts: its experts must be divided over ep",
    ),
    "a stream of tokens of all dp ranks": (
        spec("model.layers.0.input_layernorm", inputs=REPLICATED, outputs=REPLICATED),
        r"model.layers.0.input_layernorm: the residual stream is whole tokens",
    ),
    "token ids laid anew beside their batch": (
        spec("model", inputs=tokens(tp=Shard(0))),
        r"model \(input\) -> model: token ids are laid anew at the embedding only",
    ),
    "sampled rows divided as if they were all tokens": (
        spec(
            "lm_head",
            inputs=tokens(tp=Shard(0)),
            outputs=tokens(tp=Shard(0)),
            weights={"weight": REPLICATED},
        ),
        r"model -> lm_head: its rows are those that are sampled",
    ),
    "a dimension that hidden states have not": (
        spec("model", outputs=tokens(tp=Shard(2))),
        r"model: Shard\(dim=2\): hidden states are \[tokens, features\]",
    ),
    "tokens divided over tp before dp": (
        spec(f"{DENSE}.gate_up_proj", inputs={"tp": Shard(0)}),
        rf"{DENSE}.gate_up_proj: tokens are divided over dp before any other axis",
    ),
    "a block without flows": (
        flows(DENSE),
        rf"{DENSE}: a composite has flows",
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


def test_a_tied_head_says_of_its_weight_what_the_embedding_says() -> None:
    model = build("qwen3", tie_word_embeddings=True)
    spec("model.embed_tokens", weights={"weight": REPLICATED}, outputs=tokens())(model)
    with pytest.raises(ValueError, match=r"lm_head: its weight is model.embed_tokens.weight and"):
        compile_model(model, Mesh())


def test_attention_over_tokens_of_other_requests_is_refused() -> None:
    model, path = build("qwen3"), "model.layers.0.self_attn"
    heads = {"tp": Shard(1)}
    spec(f"{path}.qkv_proj", inputs=REPLICATED, outputs=heads)(model)
    spec(f"{path}.q_norm", inputs=heads, outputs=heads)(model)
    spec(f"{path}.k_norm", inputs=heads, outputs=heads)(model)
    spec(f"{path}.o_proj", inputs=heads, outputs={"tp": Partial()})(model)
    message = rf"{path}.qkv_proj -> {path}.attention_gqa: has Replicate\(\) on dp"
    with pytest.raises(ValueError, match=message):
        compile_model(model, Mesh())


def test_a_norm_of_the_stream_that_ends_a_flow_is_not_laid_anew() -> None:
    mesh = Mesh(tp=2)
    have, need = (on_atoms(layout, mesh, "") for layout in (tokens(), tokens(tp=Shard(0))))
    site = Site("model.norm", "out", "model.norm", "model (output)", have, need, moves(have, need))
    with pytest.raises(ValueError, match=r"model.norm -> model \(output\): the residual stream"):
        check_sites([site], {"model.norm": "residual_norm"}, mesh)


def test_one_of_several_inputs_is_not_laid_anew() -> None:
    model = build("minimax_m2")
    path = "model.layers.0.self_attn.qk_mean_square"
    spec(path, inputs=tokens(), outputs=tokens())(model)
    with pytest.raises(ValueError, match=rf"-> {path}: several tensors enter it"):
        compile_model(model, Mesh())


def test_layers_with_other_key_value_heads_are_refused_where_it_matters() -> None:
    model = build("qwen3", num_attention_heads=8)
    path = "model.layers.0.self_attn.qkv_proj"
    query, *rest = spec_of(path, model.get_submodule(path)).weights["weight"].parts  # type: ignore[union-attr]
    weights(path, weight=Fused(0, (replace(query, layout={"kv": Shard(0)}), *rest)))(model)
    compile_model(model, Mesh(tp=2))
    with pytest.raises(ValueError, match="4 ranks of tp divide differently"):
        compile_model(model, Mesh(tp=4))


def test_layers_with_other_numbers_of_experts_are_refused() -> None:
    model: Any = build("deepseek_v3")
    model.model.layers[2].mlp = build("deepseek_v3", n_routed_experts=8).model.layers[2].mlp
    with pytest.raises(ValueError, match=r"2.mlp.experts: 8 experts where .*1.mlp.experts has 16"):
        compile_model(model, Mesh())


def test_a_kind_whose_weight_has_another_name_is_refused() -> None:
    layer = Layer(TARGET)
    layer.own_parameter("table", (8, 8))
    layer.spec = ModuleSpec("linear", weights={"table": REPLICATED})
    with pytest.raises(ValueError, match="kind linear needs a weight named 'weight'"):
        compile_model(layer, Mesh())


def test_a_module_without_a_spec_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model \(Linear\) declares no ModuleSpec"):
        compile_model(nn.Linear(2, 2), Mesh())


def test_a_composite_with_parameters_is_refused() -> None:
    mlp = MLP(TARGET, 8, 16)
    mlp.own_parameter("scale", (8,))
    with pytest.raises(ValueError, match=r"a composite has parameters of its own: \['scale'\]"):
        compile_model(mlp, Mesh())
