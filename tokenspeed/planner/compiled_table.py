# SPDX-License-Identifier: MIT
"""The compiled table: each module, where its weights live, and the collective at its border.

Reads what the compile decided for a decode step; decides nothing.
"""

from tokenspeed.planner.estimate import Estimate
from tokenspeed.planner.table import Table
from tokenspeed.planner.workload import Workload
from tokenspeed.spmd.collectives import Collective
from tokenspeed.spmd.placement import Fused, Layout, ModuleSpec, Placement, Shard

ROWS = {"tokens": "", "all tokens": ", tokens of all dp", "sampled": ", rows of logits"}


def compiled_table(found: Estimate) -> Table:
    """Modules with weights or collectives, layers folded, for a decode step's variant."""
    workload = found.workload
    own = -(-found.load.batch // found.mesh.dp)
    variant = workload.plan.variant_for(own)
    exchanges = workload.collectives[variant]
    specs = _specs(workload)
    rows = []
    seen = []
    for entry in workload.entries:
        count = sum(entry.counts)
        weights = _placement(specs[entry.path]) if entry.op.num_elements else ""
        here = [e for e in exchanges if e.row.module == entry.path and e not in seen]
        seen += here
        if weights or here:
            held = f"{entry.op.weight_bytes / 2**20:.2f}" if entry.op.num_elements else ""
            name = entry.op.format.name if entry.op.num_elements else ""
            done = "; ".join(_exchange_text(e.row, sum(e.counts), count) for e in here)
            size = "; ".join(f"{e.row.bytes_per_row:g}" for e in here)
            rows.append((entry.path, str(count), weights, name, held, done, size))
    for e in exchanges:
        if e not in seen:
            done = _exchange_text(e.row, sum(e.counts), sum(e.counts))
            rows.append(
                (e.row.module, str(sum(e.counts)), "", "", "", done, f"{e.row.bytes_per_row:g}")
            )
    title = f"Compiled for steps of {own} tokens on a dp rank: {workload.plan.variants[variant]}"
    header = ("module", "count", "weights", "held as", "MiB/rank", "collective", "bytes/token")
    return Table(title, header, rows, numbers=False)


def _exchange_text(row: Collective, count: int, of: int) -> str:
    times = f"{count} of {of}: " if count != of else ""
    fused = f", with {row.fused}" if row.fused else ""
    return f"{times}{row.kind} {row.axis} {row.num_ranks}{ROWS[row.rows]}{fused}"


def _specs(workload: Workload) -> dict[str, ModuleSpec]:
    folded = workload.planned.folded
    found: dict[str, ModuleSpec] = {}
    for path, module in folded.model.named_modules():
        spec = getattr(module, "spec", None)
        if isinstance(spec, ModuleSpec):
            found.setdefault(folded.text(path), spec)
    return found


def _placement(spec: ModuleSpec) -> str:
    texts: dict[str, None] = {}
    for name, layout in spec.weights.items():
        if name != "bias":
            many = [p.layout for p in layout.parts] if isinstance(layout, Fused) else [layout]
            for each in many:
                texts[_layout_text(each)] = None
    return ", ".join(texts)


def _layout_text(layout: Layout) -> str:
    placed = [f"{axis} {_word(placement)}" for axis, placement in layout.items()]
    return " ".join(placed) if placed else "whole"


def _word(placement: Placement) -> str:
    return f"Shard({placement.dim})" if isinstance(placement, Shard) else str(placement)
