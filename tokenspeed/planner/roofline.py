# SPDX-License-Identifier: MIT
"""How long a step takes: the slower of memory and arithmetic for each op, collectives, launches.

    op          max(bytes / bandwidth, flops / peak)
    experts     weights of the experts that are touched: E (1 - (1 - k/E)^tokens) of E, and what
                the busiest rank has more than the mean of that
    attention   keys and values of the context, read once per sequence and step
    collective  start-up time + bytes / bandwidth for each exchange (spmd/cost.py)

Assumes that tokens choose experts evenly, and nothing overlapped with anything. Knows no memory
limits.
"""

from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

from tokenspeed.planner.devices import Device
from tokenspeed.planner.ops import Op
from tokenspeed.planner.workload import Workload
from tokenspeed.spmd.collectives import Collective
from tokenspeed.spmd.cost import Interconnect
from tokenspeed.spmd.mesh import Mesh


@dataclass(frozen=True)
class Step:
    """`sequences` on the fullest dp rank, each with `new_tokens` after `context` tokens of KV.

    `all_sequences` are those of all dp ranks, whose tokens meet in the experts.
    """

    sequences: float
    all_sequences: float
    new_tokens: int
    context: int

    @property
    def tokens(self) -> float:
        return self.sequences * self.new_tokens

    @property
    def all_tokens(self) -> float:
        return self.all_sequences * self.new_tokens


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of one pipeline stage, by what they are spent on."""

    parts: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


def stage_time(workload: Workload, device: Device, step: Step, stage: int) -> StepTime:
    """One stage's share of a step, communication included."""
    parts = dict.fromkeys(("attention", "experts", "dense", "logits", "other"), 0.0)
    launches = 0
    for entry in workload.entries:
        count = entry.counts[stage]
        parts[entry.op.kind] += count * op_time_s(entry.op, device, step)
        launches += count * entry.op.kernels
    parts["collectives"] = _collectives_s(workload, device, step, stage)
    parts["launches"] = launches * device.launch_s
    return StepTime(parts)


def op_time_s(op: Op, device: Device, step: Step) -> float:
    """Seconds of one op, without its launch."""
    if op.kind == "attention":
        return _attention_s(op, device, step)
    if op.kind == "experts":
        return _experts_s(op, device, step.all_tokens)
    tokens = step.sequences if op.kind == "logits" else step.tokens
    elements = op.num_elements + op.shared_elements
    weights = elements * op.format.bytes_per_element if op.flops else 0.0
    moved = (weights + tokens * op.traffic) / device.bytes_per_s()
    return max(moved, tokens * op.flops / device.flops_per_s(op.format.arithmetic))


def _experts_s(op: Op, device: Device, tokens: float) -> float:
    """The busiest rank: its experts that are touched, and the tokens that come to them."""
    touched = touched_share(op.expert_share, tokens)
    mean, here = touched * op.num_experts, op.num_experts
    busiest = min(_most(mean, mean * (1.0 - touched), op.expert_ranks), here) / here
    chosen = tokens * op.expert_share * op.num_experts  # pairs of token and expert
    pairs = _most(chosen, chosen, op.expert_ranks) / chosen
    moved = (busiest * op.weight_bytes + tokens * op.traffic) / device.bytes_per_s()
    return max(moved, pairs * tokens * op.flops / device.flops_per_s(op.format.arithmetic))


def _most(mean: float, variance: float, ranks: int) -> float:
    """The expected largest of `ranks` normal variables (Blom 1958)."""
    return mean + sqrt(variance) * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def _attention_s(op: Op, device: Device, step: Step) -> float:
    """A new token sees the context and, on average, half of the new tokens."""
    read = step.sequences * (step.context + step.new_tokens) * op.kv_bytes
    seen = step.context + (step.new_tokens + 1) / 2
    flops = step.tokens * seen * op.kv_flops
    return max(read / device.bytes_per_s(), flops / device.flops_per_s("bf16"))


def touched_share(expert_share: float, tokens: float) -> float:
    """The share of the experts that at least one of `tokens` chooses, each at random."""
    return float(1.0 - (1.0 - expert_share) ** tokens)


def _collectives_s(workload: Workload, device: Device, step: Step, stage: int) -> float:
    """Seconds of the variant that the compile chose for so many tokens."""
    mesh, tokens = workload.mesh, ceil(step.tokens)
    total = 0.0
    for exchange in workload.collectives[workload.plan.variant_for(tokens)]:
        if exchange.counts[stage]:
            wire = wire_of(exchange.row, mesh, device)
            one = exchange.row.seconds(tokens, mesh.dp, ceil(step.sequences), wire)
            total += exchange.counts[stage] * one
    return total


def wire_of(row: Collective, mesh: Mesh, device: Device) -> Interconnect:
    """The node's links, or the network if one of the collective's groups spans nodes."""
    if row.kind == "send":
        return device.interconnect((0, mesh.stage_ranks))
    atoms = {atom for axis in row.axis.split(" x ") for atom in mesh.axis_atoms(axis)}
    return device.interconnect(mesh.groups(sorted(atoms))[0])
