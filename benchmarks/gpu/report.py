# SPDX-License-Identifier: MIT
"""Measured rows as a table and as JSON: times, and shares of what the roofs allow. Knows no GPU."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu.shapes import Roofs


@dataclass(frozen=True)
class Row:
    """One subject on one shape. Times in microseconds, all kernels of a call counted."""

    op: str
    shape: str
    subject: str
    cold_us: float = 0.0
    replay_us: float = 0.0
    floor_us: float = 0.0
    host_plan_us: float = 0.0  # what a peer's plan costs on the host each step, in no other figure
    error: float = 0.0  # |out - reference| / |reference|
    problem: str = ""

    @property
    def share(self) -> float:
        """Of the floor's rate, under replay."""
        return self.floor_us / self.replay_us if self.replay_us else 0.0


def table(rows: list[Row]) -> str:
    """Text with a line for each row, grouped by op and shape, the fastest first."""
    head = (
        f"{'op':<18} {'shape':<34} {'subject':<20} {'cold us':>9} {'replay us':>9} {'floor us':>9}"
    )
    lines = [f"{head} {'share':>6} {'plan us':>8} {'error':>8}"]
    order = list(dict.fromkeys((row.op, row.shape) for row in rows))
    for key in order:
        group = [row for row in rows if (row.op, row.shape) == key]
        for row in sorted(group, key=lambda r: (bool(r.problem), r.replay_us)):
            start = f"{row.op:<18} {row.shape:<34} {row.subject:<20}"
            if row.problem:
                lines.append(f"{start} {row.problem}")
                continue
            times = f"{row.cold_us:>9.1f} {row.replay_us:>9.1f} {row.floor_us:>9.1f}"
            plan = f"{row.host_plan_us:>8.1f}" if row.host_plan_us else f"{'':>8}"
            lines.append(f"{start} {times} {row.share:>6.2f} {plan} {row.error:>8.1e}")
    return "\n".join(lines)


def ratios(rows: list[Row], ours: str, peer: str) -> dict[str, float]:
    """shape -> the peer's time over ours, where both were measured."""
    times = {(r.op, r.shape, r.subject): r.replay_us for r in rows if not r.problem}
    found = {}
    for (op, shape, subject), time_us in times.items():
        other = times.get((op, shape, peer))
        if subject == ours and other and time_us:
            found[f"{op} {shape}"] = round(other / time_us, 3)
    return found


def write(path: Path, machine: dict[str, Any], roofs: Roofs, rows: list[Row]) -> None:
    """All of it as JSON."""
    value = {
        "machine": machine,
        "roofs": asdict(roofs),
        "rows": [{**asdict(row), "share": round(row.share, 4)} for row in rows],
    }
    path.write_text(json.dumps(value, indent=1) + "\n")
