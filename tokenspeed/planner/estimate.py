# SPDX-License-Identifier: MIT
"""One mesh judged: does it fit, how fast is a user served, how much does each device give.

Joins memory and roofline for a question about a load; knows no search and prints nothing.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from tokenspeed.planner.catalog import PlannedModel
from tokenspeed.planner.devices import Device
from tokenspeed.planner.memory import Room, measure_room
from tokenspeed.planner.ops import ACTIVATION_BYTES
from tokenspeed.planner.roofline import Step, StepTime, stage_time
from tokenspeed.planner.workload import Workload, make_workload
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.mesh import Mesh


@dataclass(frozen=True)
class Load:
    """What is asked of the engine. `batch` requests decode at once, over all dp ranks together."""

    batch: int = 16
    context: int = 50_000  # tokens of prompt and answer so far
    cached_share: float = 0.0  # of a prompt of `context` tokens, found in the prefix cache
    page_size: int = 64
    step_tokens: int = 8192  # most tokens of one step on one dp rank
    redundant_experts: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "context", "page_size", "step_tokens", "redundant_experts"):
            value, least = getattr(self, name), 0 if name == "redundant_experts" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}: {value}")
        if not 0 <= self.cached_share < 1:
            raise ValueError(f"cached must be in [0, 1): {self.cached_share}")


@dataclass(frozen=True)
class Estimate:
    """What `load` gets from `workload` on `device`. All times are predictions of a roofline."""

    workload: Workload
    device: Device
    load: Load

    @property
    def mesh(self) -> Mesh:
        return self.workload.mesh

    @cached_property
    def room(self) -> Room:
        load = self.load
        rows = max(load.batch // self.mesh.dp, 1)
        return measure_room(
            self.workload,
            self.device,
            page_size=load.page_size,
            step_tokens=load.step_tokens,
            rows=rows,
        )

    @cached_property
    def decode(self) -> list[StepTime]:
        """A decode step of each pipeline stage, for one of the micro-steps that share them."""
        load, mesh = self.load, self.mesh
        own = -(-load.batch // mesh.dp)
        step = Step(-(-own // self.micro_steps), load.batch / self.micro_steps, 1, load.context)
        return [stage_time(self.workload, self.device, step, s) for s in range(mesh.pp)]

    @property
    def micro_steps(self) -> int:
        """Into how many the batch is divided, so that every pipeline stage has work."""
        return min(self.mesh.pp, max(self.load.batch // self.mesh.dp, 1))

    @property
    def token_s(self) -> float:
        """Seconds from one token of a user to the next."""
        stages = [time.total_s for time in self.decode]
        return max(sum(stages), self.micro_steps * max(stages))

    @property
    def tps_per_user(self) -> float:
        return 1.0 / self.token_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.load.batch / self.token_s

    @property
    def tokens_per_minute_per_device(self) -> float:
        return 60.0 * self.output_tokens_per_s / self.mesh.num_ranks

    @property
    def computed_tokens(self) -> int:
        """Of a prompt of `context` tokens."""
        return max(round(self.load.context * (1.0 - self.load.cached_share)), 1)

    @cached_property
    def prefill_s(self) -> float:
        """Seconds until one prompt is computed, its cached share apart: the first token's wait."""
        return self._prefill_s(self.load.context - self.computed_tokens)

    def _prefill_s(self, cached: int) -> float:
        """In steps of `step_tokens`; every dp rank computes a prompt of its own."""
        total, done = 0.0, 0
        while done < self.computed_tokens:
            size = min(self.load.step_tokens, self.computed_tokens - done)
            step = Step(1, self.mesh.dp, size, cached + done)
            total += sum(
                stage_time(self.workload, self.device, step, s).total_s for s in range(self.mesh.pp)
            )
            done += size
        return total

    @property
    def prefill_tokens_per_s(self) -> float:
        """Computed tokens of all dp ranks; pipeline stages work on different prompts."""
        return self.computed_tokens * self.mesh.dp * self.mesh.pp / self.prefill_s

    def cost(self, price_per_hour: float) -> dict[str, float]:
        """Price of a million tokens of each kind if the devices did nothing else.

        A cached token costs what it adds to the attention of the tokens that are computed.
        """
        per_s = price_per_hour * self.mesh.num_ranks / 3600.0
        cached = self.load.context - self.computed_tokens
        extra_s = self.prefill_s - self._prefill_s(0)
        shared = self.mesh.dp * self.mesh.pp
        return {
            "output": 1e6 * per_s / self.output_tokens_per_s,
            "input computed": 1e6 * per_s * self._prefill_s(0) / (self.computed_tokens * shared),
            "input cached": 1e6 * per_s * extra_s / (cached * shared) if cached else 0.0,
        }

    def with_batch(self, batch: int) -> "Estimate":
        return Estimate(self.workload, self.device, replace(self.load, batch=batch))


def estimate(planned: PlannedModel, mesh: Mesh, device: Device, load: Load) -> Estimate:
    """Compiles for `mesh`. `ValueError` names what does not divide; memory is not checked."""
    plan = compile_model(
        planned.folded.model,
        replace(mesh, pp=1),
        interconnect=device.interconnect(tuple(range(mesh.stage_ranks))),
        max_tokens=load.step_tokens,
        itemsize=ACTIVATION_BYTES,
        memory_bandwidth=device.bytes_per_s(),
        num_redundant_experts=load.redundant_experts,
    )
    return Estimate(make_workload(planned, mesh, plan), device, load)
