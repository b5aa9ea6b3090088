# SPDX-License-Identifier: MIT
"""A device that need not be here: step times from the planner's roofline, made into tables.

What depends on the number of tokens alone is a table; attention is added row by row, each row the
slower of memory and arithmetic. Knows no requests. Overlap of anything with anything is left out,
as the planner does (`planner/roofline.py`).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenspeed.engine.drafting import experts_of
from tokenspeed.planner.devices import Device
from tokenspeed.planner.estimate import Estimate
from tokenspeed.planner.ops import Op
from tokenspeed.planner.roofline import Step, op_time_s, stage_time
from tokenspeed.planner.workload import Workload
from tokenspeed.simulation.device_profile import StepShape

DENSE_TO = 64  # tokens up to which each count has an entry of its own
GROWTH = 1.08  # from one entry to the next above


class RooflineProfile:
    """Step times of a compiled model on a mesh of devices. Steps are of at most the load's tokens.

    `ValueError`: the mesh has several stages, or a time is negative or not finite.
    """

    def __init__(self, found: Estimate, *, host_s: float = 0.0, request_s: float = 0.0) -> None:
        if found.mesh.pp > 1:
            raise ValueError(f"mesh {found.mesh}: pipeline stages are not simulated")
        for name, value in {"host_s": host_s, "request_s": request_s}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative: {value}")
        self.name = f"{found.workload.planned.name} on {found.mesh.num_ranks} x {found.device.name}"
        self.host_s, self.request_s, self.noise = host_s, request_s, 0.0
        workload, device = found.workload, found.device
        self.experts = experts_of(workload.planned.model.modules())
        self._attention = [
            (entry.counts[0], _Attention(entry.op, device))
            for entry in workload.entries
            if entry.op.kind == "attention"
        ]
        self._base, self._logits = _tables(workload, device, found.load.step_tokens, found.mesh.dp)
        slope = sum(count * attention.decode_s(1) for count, attention in self._attention)
        self._decode_s = float(slope)  # of a token of context that a decoding row reads

    def step_s(self, shapes: Sequence[StepShape]) -> float:
        """All data-parallel ranks meet in each layer: the slowest of each part counts."""
        tokens = max(s.decode_rows + s.verify_tokens + s.prefill_tokens for s in shapes)
        sampled = max(shape.sampled_rows + shape.verify_tokens for shape in shapes)
        base = float(self._base[min(tokens, len(self._base) - 1)])
        logits = float(self._logits[min(sampled, len(self._logits) - 1)])
        return base + logits + max(map(self._attention_s, shapes))

    def growth_s(self, shapes: Sequence[StepShape]) -> float:
        slowest = max(shapes, key=lambda shape: shape.decode_context)
        return slowest.decode_rows * self._decode_s

    def _attention_s(self, shape: StepShape) -> float:
        slope = self._decode_s
        if shape.verify_tokens:
            new = 1 + shape.verify_tokens / shape.decode_rows  # tokens of a row
            slope = sum(count * attention.decode_s(new) for count, attention in self._attention)
        seconds = shape.decode_context * slope
        if not shape.only_decodes:
            for count, attention in self._attention:
                seconds += count * attention.prefill_s(shape.prefill_starts, shape.prefill_counts)
        return seconds


class _Attention:
    """One attention op: what a decoding row costs for each token of its context, and chunks."""

    def __init__(self, op: Op, device: Device) -> None:
        self._read_s = op.kv_bytes / device.bytes_per_s()
        self._flop_s = op.kv_flops / device.flops_per_s("bf16")

    def decode_s(self, new: float) -> float:
        """Of a row of so many tokens, each of which sees a token that is read once."""
        return max(self._read_s, new * self._flop_s)

    def prefill_s(self, starts: NDArray[np.int32], counts: NDArray[np.int32]) -> float:
        context, new = starts.astype(np.float64), counts.astype(np.float64)
        read = (context + new) * self._read_s
        computed = new * (context + (new + 1) / 2) * self._flop_s
        return float(np.maximum(read, computed).sum())


def _tables(
    workload: Workload, device: Device, most: int, num_dp: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[most + 1] seconds of a step by its tokens, attention and logits apart; [rows + 1] logits."""
    counts = list(range(1, min(most, DENSE_TO) + 1))
    while counts[-1] < most:
        counts.append(min(int(counts[-1] * GROWTH) + 1, most))
    base, logits = [], []
    heads = [(e.counts[0], e.op) for e in workload.entries if e.op.kind == "logits"]
    for tokens in counts:
        parts = stage_time(workload, device, Step(1, num_dp, tokens, 0), 0).parts
        base.append(sum(parts.values()) - parts["attention"] - parts["logits"])
        rows = Step(tokens, tokens * num_dp, 1, 0)
        logits.append(sum(count * op_time_s(op, device, rows) for count, op in heads))
    every = np.arange(most + 1)
    rows_s = np.interp(every, counts, logits)
    rows_s[0] = 0.0
    return np.interp(every, counts, base), rows_s
