# SPDX-License-Identifier: MIT
"""What /metrics says of speculative decoding: vLLM's names, types and labels, and ours."""

from prometheus_client.parser import text_string_to_metric_families

from tokenspeed.engine.messages import (
    DrafterStats,
    EngineStats,
    SpeculationStats,
    StepTimeStats,
)
from tokenspeed.gateway.exposition import exposition
from tokenspeed.gateway.metrics import Metrics

BOTH = '{engine="1",model_name="m"}'


def shown() -> str:
    drafters = [
        DrafterStats("suffix", 10, 70, 35, [9, 8, 7, 6, 5]),
        DrafterStats("mtp", 4, 8, 5, [3, 2]),
    ]
    metrics = Metrics("m", 2)
    speculation = SpeculationStats(drafters, [20, 0, 4, 10])
    metrics.engines[1].stats = EngineStats(
        speculation=speculation, step_times=StepTimeStats(9, 1.5, 1.25, 0.125)
    )
    return exposition(metrics).decode()


def test_totals_are_named_and_labelled_as_vllms() -> None:
    lines = shown().splitlines()
    for name, value in {"drafts": 14.0, "draft_tokens": 78.0, "accepted_tokens": 40.0}.items():
        assert f"# TYPE vllm:spec_decode_num_{name}_total counter" in lines
        assert f"vllm:spec_decode_num_{name}_total{BOTH} {value}" in lines
        other = f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="m"}} 0.0'
        assert other in lines
    found = [line for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_per")]
    assert found == [
        "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        f'{{engine="1",model_name="m",position="{place}"}} {value}.0'
        for place, value in enumerate((12, 10, 7, 6, 5))
    ]


def test_each_drafter_has_its_own() -> None:
    lines = shown().splitlines()
    values = {"suffix": (10.0, 70.0, 35.0), "mtp": (4.0, 8.0, 5.0)}
    for drafter, counts in values.items():
        labels = f'{{drafter="{drafter}",engine="1",model_name="m"}}'
        names = ("drafts", "draft_tokens", "accepted_tokens")
        for name, value in zip(names, counts, strict=True):
            assert f"tokenspeed:spec_decode_{name}_total{labels} {value}" in lines


def test_depths_and_step_times() -> None:
    lines = shown().splitlines()
    buckets = {"0.0": 20.0, "1.0": 20.0, "2.0": 24.0, "3.0": 34.0, "+Inf": 34.0}
    for bound, value in buckets.items():
        labels = f'{{engine="1",le="{bound}",model_name="m"}}'
        assert f"tokenspeed:spec_decode_depth_bucket{labels} {value}" in lines
    assert f"tokenspeed:spec_decode_depth_sum{BOTH} 38.0" in lines
    assert f"tokenspeed:step_predicted_seconds_total{BOTH} 1.5" in lines
    assert f"tokenspeed:step_measured_seconds_total{BOTH} 1.25" in lines
    assert f"tokenspeed:step_time_error{BOTH} 0.125" in lines


def test_prometheus_can_read_all_of_it() -> None:
    types = {family.name: family.type for family in text_string_to_metric_families(shown())}
    assert types["vllm:spec_decode_num_drafts"] == "counter"
    assert types["tokenspeed:spec_decode_depth"] == "histogram"
