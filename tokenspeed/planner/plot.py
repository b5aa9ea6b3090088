# SPDX-License-Identifier: MIT
"""The trade between a user's speed and a device's, one line a mesh. Needs matplotlib.

Computes nothing but the same estimates at other batch sizes.
"""

from pathlib import Path

from tokenspeed.planner.estimate import Estimate
from tokenspeed.planner.search import Found

MESHES = 6


def draw(found: Found, tps_floor: float, path: Path) -> None:
    """Writes a picture of the best meshes. `ValueError` without matplotlib or for a bad ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for each in _shown(found):
        points = [each.with_batch(batch) for batch in _batches(each)]
        speeds = [point.tps_per_user for point in points]
        rates = [point.tokens_per_minute_per_device for point in points]
        axes.plot(speeds, rates, marker="o", markersize=3, label=str(each.mesh))
    axes.axvline(tps_floor, color="grey", linestyle=":", label=f"floor {tps_floor:g} TPS")
    axes.set(xlabel="tokens per second each user sees", yscale="log")
    axes.set_ylabel("output tokens per minute and device")
    if found.ranked or found.slow:
        each = (*found.ranked, *found.slow)[0]
        count, name = each.mesh.num_ranks, each.workload.planned.name
        axes.set_title(f"{name} on {count} x {each.device.name}, {each.load.context:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _shown(found: Found) -> list[Estimate]:
    """The best at the floor, and the one that serves a lone user fastest."""
    every = [*found.ranked, *found.slow]
    fastest = max(every, key=lambda each: each.with_batch(1).tps_per_user, default=None)
    first = every[: MESHES - 1]
    return first if fastest is None or fastest in first else [*first, fastest]


def _batches(each: Estimate) -> list[int]:
    """Powers of two of the smallest useful batch, up to what fits."""
    unit = each.mesh.dp * each.mesh.pp
    most = max(each.room.concurrency(each.load.context), unit)
    sizes = [1]
    while unit <= most:
        sizes.append(unit)
        unit *= 2
    return sorted(set(sizes))
