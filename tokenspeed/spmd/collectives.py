# SPDX-License-Identifier: MIT
"""The collectives of a compiled model as rows: where, what, over which ranks, how many bytes.

Knows a plan's decisions; refuses to know tensors. The cost model of `compile_model` and the table
of `tokenspeed plan` read the same rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from tokenspeed.spmd.cost import Interconnect
from tokenspeed.spmd.layout import Move, label

if TYPE_CHECKING:
    from tokenspeed.spmd.compile import SpmdPlan

Rows = Literal["tokens", "all tokens", "sampled"]


@dataclass(frozen=True)
class Variant:
    """The decisions that a plan's variants differ in (see `spmd/compile.py`)."""

    split: bool = False
    dispatch: bool = False

    def __str__(self) -> str:
        stream = "reduce-scatter + all-gather" if self.split else "all-reduce"
        return f"{stream}, experts by {'all-to-all' if self.dispatch else 'all-gather'}"


@dataclass(frozen=True)
class Collective:
    """One collective of a step on one rank.

    `rows` says what its bytes are per: a token of the own dp rank, of all dp ranks, or a row of
    logits. `bytes_per_row` is of the whole tensor that is summed, gathered or sent.
    """

    module: str
    kind: str
    axis: str
    num_ranks: int
    bytes_per_row: float
    rows: Rows = "tokens"
    fused: str = ""  # what is fused with it

    def seconds(self, num_tokens: int, num_dp: int, num_sampled: int, wire: Interconnect) -> float:
        """By the cost model, for a step of `num_tokens` tokens on each dp rank."""
        counts = {"tokens": num_tokens, "all tokens": num_tokens * num_dp, "sampled": num_sampled}
        size = self.bytes_per_row * counts[self.rows]
        if self.kind == "send":
            return wire.send_s(size)
        cost: float = getattr(wire, f"{self.kind}_s")(size, self.num_ranks)
        return cost


def collectives_of(plan: "SpmdPlan", variant: Variant, itemsize: int) -> list[Collective]:
    """In the order of the model's modules, a rank's entry before its exit."""
    places = {path: at for at, path in enumerate(plan.widths)}
    rows = [row for path in plan.stream for row in _of_norm(plan, path, variant, itemsize)]
    for (path, side), site in plan.sites.items():
        if path in plan.stream and side == "in":
            continue
        if path in plan.experts and variant.dispatch:
            rows += _dispatch(plan, path, side, itemsize)
            continue
        width = plan.widths[path] if side == "in" else plan.out_widths[path]
        for move in site.moves:
            rows += _row(plan, path, move, width * itemsize)
    for stage in range(1, plan.stages.count):
        first = f"{plan.stages.layers}.{plan.stages.bounds[stage]}"
        width = plan.widths[plan.stages.exit]
        split = plan.mesh.tp if variant.split else 1
        rows.append(Collective(first, "send", "pp", 2, width * itemsize / split))
    return sorted(rows, key=lambda row: places.get(row.module, -1))


def _of_norm(plan: "SpmdPlan", path: str, variant: Variant, itemsize: int) -> Iterator[Collective]:
    """A norm of the residual stream: one fused op in place of collective, sum and norm."""
    site, tp = plan.sites.get((path, "in")), plan.mesh.axis_atoms("tp")
    size, ranks = plan.widths[path] * itemsize, plan.mesh.tp
    if not tp or (site is None and not variant.split):
        return
    if not variant.split:
        yield Collective(path, "all_reduce", "tp", ranks, size, fused="add + norm")
        return
    if site is not None:
        yield Collective(path, "reduce_scatter", "tp", ranks, size, fused="add + norm")
    yield Collective(path, "all_gather", "tp", ranks, size)


def _row(plan: "SpmdPlan", path: str, move: Move, num_bytes: int) -> list[Collective]:
    if move.kind == "slice":
        return []
    mesh = plan.mesh
    ranks = prod(mesh.atoms[atom] for atom in move.atoms)
    rows: Rows = "tokens"
    if move.dim == 0 and move.kind != "all_reduce" and {*move.atoms} & {*mesh.axis_atoms("dp")}:
        rows = "all tokens"
    if path in plan.heads:
        rows = "sampled"
    return [Collective(path, move.kind, label(move.atoms, mesh), ranks, num_bytes, rows)]


def _dispatch(plan: "SpmdPlan", path: str, side: str, itemsize: int) -> list[Collective]:
    """What a rank sends: each of its tokens once to every rank that has one of its experts."""
    mesh, width = plan.mesh, plan.widths[path]
    repeats = mesh.stage_ranks // mesh.etp // mesh.dp  # ranks that share a dp rank's tokens
    copies = min(plan.top_k, mesh.ep) / repeats
    num_bytes = width * itemsize * copies
    return [Collective(path, "all_to_all", "ep", mesh.ep, num_bytes)]


def cost_s(
    plan: "SpmdPlan", variant: Variant, num_tokens: int, wire: Interconnect, itemsize: int
) -> float:
    """Seconds of a step's collectives, and of the norms that a split stream makes shorter."""
    rows = collectives_of(plan, variant, itemsize)
    sampled = min(num_tokens, 256)
    total = sum(row.seconds(num_tokens, plan.mesh.dp, sampled, wire) for row in rows)
    shared = plan.mesh.tp if variant.split else 1
    # A norm reads x and the residual and writes both.
    norm_bytes = sum(4 * plan.widths[path] * itemsize for path in plan.stream)
    return total + norm_bytes * num_tokens / shared / plan.memory_bandwidth
