# SPDX-License-Identifier: MIT
"""What fits into each rank's memory: weights, keys and values, and what must stay free.

Activations are counted as the widest moment of one step: the residual stream, a layer's input and
its widest product, and whole rows of logits. Knows no times.
"""

from dataclasses import dataclass

from tokenspeed.errors import TokenSpeedError
from tokenspeed.planner.devices import GIB, Device
from tokenspeed.planner.ops import ACTIVATION_BYTES
from tokenspeed.planner.workload import Workload


class DoesNotFitError(TokenSpeedError, ValueError):
    """Weights, or the requests asked for, need more memory than a rank has."""


@dataclass(frozen=True)
class Room:
    """One engine's memory. Bytes are of the fullest rank."""

    device_bytes: float
    weight_bytes: float
    table_bytes: float  # rotary tables
    runtime_bytes: float
    activation_bytes: float
    kv_bytes_per_token: float
    page_size: int
    num_dp: int
    max_position: int

    @property
    def kv_bytes(self) -> float:
        """Left for keys and values; negative if the weights do not fit."""
        return self.device_bytes - self.weight_bytes - self.other_bytes

    @property
    def other_bytes(self) -> float:
        return self.table_bytes + self.runtime_bytes + self.activation_bytes

    @property
    def num_pages(self) -> int:
        """Of each dp rank."""
        page = self.page_size * self.kv_bytes_per_token
        return max(int(self.kv_bytes // page), 0) if page else 0

    @property
    def kv_tokens(self) -> int:
        """Tokens of context that all dp ranks hold together."""
        return self.num_pages * self.page_size * self.num_dp

    @property
    def max_context(self) -> int:
        """Of one request alone."""
        return min(self.num_pages * self.page_size, self.max_position)

    def concurrency(self, context: int) -> int:
        """Requests of `context` tokens that run at once."""
        return self.num_pages // -(-context // self.page_size) * self.num_dp

    def check(self, batch: int, context: int) -> None:
        """`DoesNotFitError` says by how many GiB, and what would fit."""
        page_bytes = self.page_size * self.kv_bytes_per_token
        if 0 <= self.kv_bytes < page_bytes:
            raise DoesNotFitError(
                f"a page of {self.page_size} tokens takes {page_bytes / GIB:.1f} GiB, and"
                f" {self.kv_bytes / GIB:.1f} GiB of a rank are left for keys and values"
            )
        if self.kv_bytes < 0:
            raise DoesNotFitError(
                f"weights of {self.weight_bytes / GIB:.1f} GiB, and {self.other_bytes / GIB:.1f} "
                f"GiB of runtime and activations, exceed the {self.device_bytes / GIB:.1f} GiB of "
                f"a rank by {-self.kv_bytes / GIB:.1f} GiB"
            )
        if self.concurrency(context) < batch:
            per_dp = -(-batch // self.num_dp)
            need = per_dp * -(-context // self.page_size) * self.page_size
            missing = need * self.kv_bytes_per_token - self.kv_bytes
            longest = self.num_pages // per_dp * self.page_size
            longest = min(longest, self.max_position)
            shorter = f", or {batch} of {longest} tokens" if longest else ""
            raise DoesNotFitError(
                f"{batch} requests of {context} tokens need {missing / GIB:.1f} GiB more for keys "
                f"and values on each rank; {self.concurrency(context)} such requests fit"
                f"{shorter}"
            )


def measure_room(
    workload: Workload, device: Device, *, page_size: int, step_tokens: int, rows: int
) -> Room:
    """`step_tokens` is the most tokens of one step on one dp rank, `rows` of them give logits."""
    mesh = workload.mesh
    stages = range(mesh.pp)
    return Room(
        device_bytes=device.memory_bytes,
        weight_bytes=max(workload.weight_bytes(stage) for stage in stages),
        table_bytes=workload.planned.table_bytes,
        runtime_bytes=device.runtime_bytes,
        activation_bytes=_activations(workload, step_tokens, rows),
        kv_bytes_per_token=workload.kv_bytes_per_token,
        page_size=page_size,
        num_dp=mesh.dp,
        max_position=workload.planned.model.max_position,
    )


def _activations(workload: Workload, step_tokens: int, rows: int) -> float:
    """The experts' input and output are those of all dp ranks' tokens."""
    stream = 3.0 * workload.hidden_size * ACTIVATION_BYTES * step_tokens
    ops = [entry.op for entry in workload.entries if entry.op.kind in ("dense", "experts")]
    widest = max((op.traffic * (workload.mesh.dp if op.kind == "experts" else 1)) for op in ops)
    return stream + widest * step_tokens + 4.0 * rows * workload.vocab_size
