# SPDX-License-Identifier: MIT
"""The planner's arithmetic: parameters, formats, roofline, memory and search."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.checkpoints import FAMILIES
from tokenspeed.errors import ModelLoadError
from tokenspeed.planner.catalog import PlannedModel, describe, find_config, open_model
from tokenspeed.planner.devices import DEVICES, GIB, find_device, with_memory
from tokenspeed.planner.estimate import Estimate, Load, estimate
from tokenspeed.planner.memory import DoesNotFitError
from tokenspeed.planner.ops import Op
from tokenspeed.planner.roofline import Step, op_time_s, touched_share
from tokenspeed.planner.search import largest_batch, search, smallest_count
from tokenspeed.planner.weight_format import BF16, FP8, INT4
from tokenspeed.spmd.cost import Interconnect
from tokenspeed.spmd.mesh import Mesh

H200, DEFAULT = DEVICES["h200"], Load()


opened = cache(open_model)


@cache
def judged(name: str, mesh: Mesh, load: Load = DEFAULT, gpu: str = "h200") -> Estimate:
    return estimate(opened(name), mesh, DEVICES[gpu], load)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v3", 671.0e9, 37e9),
        ("kimi-k2.6", 1026.4e9, 32e9),
        ("qwen3-235b", 235.1e9, 22e9),
        ("minimax-m2", 228.7e9, 10e9),
    ],
)
def test_shipped_shapes_have_the_published_parameters(
    name: str, total: float, active: float
) -> None:
    found = judged(name, Mesh())
    assert found.workload.planned.num_parameters == pytest.approx(total, rel=1e-3)
    used = sum(
        entry.op.num_elements * entry.op.expert_share * sum(entry.counts)
        for entry in found.workload.entries
        if not entry.path.endswith("embed_tokens")
    )
    assert used == pytest.approx(active, rel=0.06)


def held_as(planned: PlannedModel, path: str) -> str:
    return planned.format_of(path, planned.model.get_submodule(path)).name


def test_formats_follow_the_checkpoint() -> None:
    kimi, deepseek = opened("kimi-k2.6"), opened("deepseek-v3")
    layer = "model.layers.5"
    for path in ("mlp.shared_experts.gate_up_proj", "self_attn.o_proj", "input_layernorm"):
        assert held_as(kimi, f"{layer}.{path}") == "bf16"
    assert held_as(kimi, "model.layers.0.mlp.gate_up_proj") == "bf16"
    assert held_as(kimi, f"{layer}.mlp.experts") == "int4"
    for path in ("mlp.shared_experts.down_proj", "self_attn.kv_b_proj", "mlp.experts"):
        assert held_as(deepseek, f"{layer}.{path}") == "fp8"
    assert held_as(deepseek, "lm_head") == held_as(deepseek, "model.embed_tokens") == "bf16"
    assert held_as(deepseek, f"{layer}.mlp.gate") == "fp32"


def test_the_files_of_the_checkpoint_are_as_large_as_planned() -> None:
    """Published sizes on disk: Kimi K2.6 595 GB with its vision part, DeepSeek V3 without MTP."""
    assert judged("kimi-k2.6", Mesh()).room.weight_bytes == pytest.approx(595e9, rel=0.01)
    fp8 = judged("deepseek-v3", Mesh()).room.weight_bytes
    assert fp8 == pytest.approx(673e9, rel=0.01)


def test_a_format_may_be_asked_for() -> None:
    whole = describe("x", demo_config(), "bf16")
    small = describe("x", demo_config(), "int4")
    assert held_as(whole, "model.layers.2.mlp.experts") == "bf16"
    assert held_as(small, "model.layers.2.mlp.experts") == "int4"
    assert held_as(small, "model.layers.2.self_attn.o_proj") == "bf16"


def demo_config() -> dict[str, object]:
    return dict(json.loads(find_config("demo").read_text()))


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "fp8", "modules_to_not_convert": "gate"},
        {"quant_method": "fp8", "modules_to_not_convert": ["re:("]},
    ],
)
def test_unknown_quantisation_is_refused_by_key(section: dict[str, object]) -> None:
    with pytest.raises(ModelLoadError, match="quantization_config"):
        describe("x", demo_config() | {"quantization_config": section})


def test_touched_experts_match_a_draw() -> None:
    generator = torch.Generator().manual_seed(1)
    draws, experts, chosen, tokens = 400, 64, 6, 16
    distinct = 0
    for _ in range(draws):
        scores = torch.rand(tokens, experts, generator=generator)
        distinct += len(scores.topk(chosen).indices.unique())
    assert touched_share(chosen / experts, tokens) == pytest.approx(
        distinct / draws / experts, rel=0.02
    )


def test_an_op_takes_the_slower_of_memory_and_arithmetic() -> None:
    op = Op("dense", 10**9, BF16, flops=2e9)
    one, many = Step(1, 1, 1, 0), Step(4096, 4096, 1, 0)
    assert op_time_s(op, H200, one) == pytest.approx(2e9 / (4.8e12 * 0.9))
    assert op_time_s(op, H200, many) == pytest.approx(4096 * 2e9 / (989e12 * 0.8))
    assert op_time_s(replace(op, format=FP8), H200, many) == pytest.approx(
        4096 * 2e9 / (1979e12 * 0.8)
    )
    assert INT4.arithmetic == "bf16"


def test_attention_reads_the_context_once_a_sequence() -> None:
    op = Op("attention", kv_bytes=1000.0, kv_flops=1.0)
    step = Step(8, 8, 1, 49_999)
    assert op_time_s(op, H200, step) == pytest.approx(8 * 50_000 * 1000 / (4.8e12 * 0.9))
    # Prefill: each of 4 tokens sees the context and, on average, 2.5 of the new ones.
    busy = replace(op, kv_bytes=0.0, kv_flops=1e9)
    assert op_time_s(busy, H200, Step(1, 1, 4, 10)) == pytest.approx(4 * 12.5e9 / (989e12 * 0.8))


def test_kv_and_collectives_of_a_known_model() -> None:
    """Kimi K2: a latent of 512 + 64 numbers in 61 layers, two all-reduces a layer and one more."""
    found = judged("kimi-k2.6", Mesh(tp=8, ep=8))
    assert found.room.kv_bytes_per_token == 576 * 2 * 61
    exchanges = found.workload.collectives[found.workload.plan.variant_for(2)]
    counts = {e.row.kind: 0 for e in exchanges}
    for exchange in exchanges:
        counts[exchange.row.kind] += sum(exchange.counts)
        if exchange.row.kind == "all_reduce":
            assert exchange.row.bytes_per_row == 7168 * 2
    assert counts == {"all_reduce": 2 * 61 + 1, "all_gather": 1}


def test_heads_of_keys_are_divided_or_repeated() -> None:
    one = judged("qwen3-235b", Mesh()).room.kv_bytes_per_token
    assert one == 4 * 128 * 2 * 2 * 94
    assert judged("qwen3-235b", Mesh(tp=4)).room.kv_bytes_per_token == one / 4
    assert judged("qwen3-235b", Mesh(tp=8)).room.kv_bytes_per_token == one / 4


@pytest.mark.parametrize("gpu", [*DEVICES, "cpu"])
def test_devices_have_what_the_planner_asks(gpu: str) -> None:
    device = find_device(gpu)
    assert device.memory_bytes > GIB / 4
    rates = [device.flops_per_s(kind) for kind in ("fp32", "bf16", "fp8", "fp4")]
    assert rates[1:] == sorted(rates[1:])
    assert min(rates) > 0
    assert device.interconnect((0, 1)).bandwidth <= device.link_bandwidth


def test_groups_across_nodes_use_the_network() -> None:
    assert H200.interconnect((0, 7)) != H200.network
    assert H200.interconnect((0, 8)) == H200.network
    pair, all_peers = (DEVICES["mi355x"].interconnect(tuple(range(n))) for n in (2, 8))
    assert pair.bandwidth * 7 == pytest.approx(all_peers.bandwidth)


def test_collectives_cost_what_the_formula_says() -> None:
    wire = Interconnect(latency_s=1e-6, bandwidth=1e9)
    assert wire.all_gather_s(8000, 4) == pytest.approx(1e-6 + 6e-6)
    assert wire.reduce_scatter_s(8000, 4) == wire.all_to_all_s(8000, 4) == pytest.approx(7e-6)
    assert wire.all_reduce_s(8, 4) == pytest.approx(1e-6 + 24e-9)  # everything to everybody
    assert wire.all_reduce_s(8e6, 4) == pytest.approx(2e-6 + 12e-3)  # scatter and gather
    assert wire.all_reduce_s(8e6, 1) == 0.0
    assert wire.send_s(1000) == pytest.approx(2e-6)
    with pytest.raises(ValueError, match="bandwidth"):
        Interconnect(0.0, 0.0)


def test_time_grows_with_batch_and_context() -> None:
    found = judged("deepseek-v3", Mesh(tp=8, ep=8))
    times = [found.with_batch(batch).token_s for batch in (1, 2, 8, 32, 128)]
    assert times == sorted(times)
    longer = Estimate(found.workload, H200, replace(found.load, context=100_000))
    assert longer.token_s > found.token_s
    assert longer.prefill_s > 2 * found.prefill_s


def test_cached_tokens_cost_less_than_computed_ones() -> None:
    load = Load(cached_share=0.9)
    found = judged("kimi-k2.6", Mesh(dp=8, ep=8), load)
    assert found.computed_tokens == 5000
    cost = found.cost(3.0)
    assert 0 < cost["input cached"] < cost["input computed"] < cost["output"]
    per_s = 8 * 3.0 / 3600
    assert cost["output"] == pytest.approx(1e6 * per_s / found.output_tokens_per_s)
    fresh = judged("kimi-k2.6", Mesh(dp=8, ep=8))
    assert fresh.prefill_s > found.prefill_s
    assert fresh.cost(3.0)["input cached"] == 0.0


def test_stages_of_a_pipeline_share_the_layers() -> None:
    whole, halves = (judged("qwen3-235b", Mesh(tp=4, pp=pp)) for pp in (1, 2))
    sizes = [halves.workload.weight_bytes(stage) for stage in range(2)]
    assert sum(sizes) == pytest.approx(whole.workload.weight_bytes(0))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert halves.room.kv_bytes_per_token == whole.room.kv_bytes_per_token / 2
    # A lone user waits for both stages; a batch keeps both busy.
    assert halves.with_batch(1).token_s > 0.9 * whole.with_batch(1).token_s
    assert halves.with_batch(16).micro_steps == 2


def test_what_does_not_fit_is_refused_with_the_amount() -> None:
    with pytest.raises(DoesNotFitError, match=r"exceed the 79\.1 GiB of a rank by \d+\.\d GiB"):
        judged("deepseek-v3", Mesh(tp=8, ep=8), gpu="h100").room.check(1, 1000)
    found = judged("kimi-k2.6", Mesh(tp=8, ep=8))
    fits = found.room.concurrency(50_000)
    found.room.check(fits, 50_000)
    with pytest.raises(DoesNotFitError, match=rf"{fits} such requests fit, or {fits + 1} of \d+"):
        found.room.check(fits + 1, 50_000)
    assert smallest_count(opened("deepseek-v3"), DEVICES["h100"], Load(), 8) == 16


def test_search_tries_every_mesh_and_says_why_not() -> None:
    tight, load, floor = with_memory(H200, 3.05), Load(context=4000), 900.0
    found = search(opened("demo"), tight, 8, load, floor)
    meshes = [each.mesh for each in (*found.ranked, *found.slow)]
    assert len({(m.tp, m.dp, m.ep, m.pp) for m in meshes}) == len(meshes)
    assert all(mesh.num_ranks == 8 for mesh in meshes)
    assert len(meshes) + sum(found.refused.values()) == 40
    assert found.ranked
    assert found.refused["does not fit in memory"] > 0  # what keeps its whole KV cache
    rates = [each.tokens_per_minute_per_device for each in found.ranked]
    assert rates == sorted(rates, reverse=True)
    for each in found.ranked:
        assert each.tps_per_user >= floor
        assert each.room.concurrency(each.load.context) >= each.load.batch
        unit = each.mesh.dp * each.mesh.pp
        more = each.with_batch((each.load.batch // unit + 1) * unit)
        room = more.room.concurrency(more.load.context)
        assert more.tps_per_user < floor or room < more.load.batch


def test_search_gives_reasons_by_kind() -> None:
    config = json.loads(FAMILIES["qwen3"](architectures=["Qwen3ForCausalLM"]).to_json_string())
    found = search(describe("tiny", config), H200, 16, Load(context=64), 1.0)
    assert found.refused["no experts for the axis ep"] > 0
    assert found.refused["tp does not divide the heads"] > 0
    assert found.refused["more pipeline stages than layers"] > 0
    assert all(len(reason) < 60 for reason in found.refused), found.refused


def test_the_floor_decides_the_batch() -> None:
    found = judged("kimi-k2.6", Mesh(tp=8, ep=8))
    batches = [largest_batch(found, floor).load.batch for floor in (200.0, 70.0, 50.0, 1.0)]
    assert batches == sorted(batches)
    assert batches[0] < batches[-1] == found.room.concurrency(50_000)


def test_a_name_that_is_nowhere_lists_the_shapes() -> None:
    for name in ("owner/none", "kimi", "a b", ""):
        with pytest.raises(ModelLoadError, match=r"deepseek-v3, demo, kimi-k2\.5"):
            open_model(name)


@pytest.mark.parametrize("options", [{"batch": 0}, {"cached_share": 1.0}, {"context": -1}])
def test_impossible_loads_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        Load(**options)


def test_times_are_finite_on_every_mesh_of_four() -> None:
    found = search(opened("demo"), H200, 4, Load(context=1024), 1.0)
    for each in (*found.ranked, *found.slow):
        assert all(math.isfinite(time.total_s) for time in each.decode)
        assert each.prefill_s > 0
