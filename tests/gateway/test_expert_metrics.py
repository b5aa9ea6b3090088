# SPDX-License-Identifier: MIT
"""What /metrics says of expert-load balancing and of retention."""

from tokenspeed.engine.messages import EngineStats
from tokenspeed.gateway.exposition import exposition
from tokenspeed.gateway.metrics import Metrics


def test_expert_loads_are_shown_for_each_engine() -> None:
    metrics = Metrics("m", 2)
    metrics.engines[1].stats = EngineStats(
        expert_load_mean=1.25,
        expert_load_worst=1.5,
        expert_load_rebalances=3,
        expert_load_slots_moved=17,
    )
    lines = exposition(metrics).decode().splitlines()
    for name, values in {
        "imbalance_mean": (0.0, 1.25),
        "imbalance_worst": (0.0, 1.5),
        "rebalances_total": (0.0, 3.0),
        "slots_moved_total": (0.0, 17.0),
    }.items():
        for engine, value in enumerate(values):
            labels = f'engine="{engine}",model_name="m"'
            assert f"tokenspeed:expert_load_{name}{{{labels}}} {value}" in lines


def test_retained_and_pinned_pages_are_shown() -> None:
    metrics = Metrics("m")
    metrics.engines[0].stats = EngineStats(num_retained_pages=7, num_pinned_pages=3)
    lines = exposition(metrics).decode().splitlines()
    assert 'tokenspeed:retained_pages{engine="0",model_name="m"} 7.0' in lines
    assert 'tokenspeed:pinned_pages{engine="0",model_name="m"} 3.0' in lines
