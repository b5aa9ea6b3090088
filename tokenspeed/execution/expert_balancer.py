# SPDX-License-Identifier: MIT
"""`ExpertBalancer`: measures, decides and moves experts between steps. Knows no requests.

    step        | ... interval |    + lag   |  + 1  |  + 2  | ...
    after it    |   measure    |   decide   | move  | move  |        one layer after each step

Every rank runs every step, so all of them know from the step's number alone what is due, and no
message says so. Measuring sums the ranks' counts; the group's first rank then solves on a thread of
its own while steps go on; deciding broadcasts its placements, so that ranks never rely on solving
alike. All else happens on the thread that runs the steps: no weight changes under a step.
"""

import hashlib
import itertools
import socket
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.config import ExpertOptions
from tokenspeed.execution.expert_load import ExpertLoad
from tokenspeed.layers.moe import MoE
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.spmd.expert_exchange import exchange
from tokenspeed.spmd.expert_placement import ExpertPlacement
from tokenspeed.spmd.expert_solver import Solver
from tokenspeed.spmd.experts import Slots
from tokenspeed.spmd.group import Group

LAG = 4  # the solver gets an interval's fourth part of steps


@dataclass(frozen=True)
class BalancedLayer:
    """One layer's experts on this rank: lookup tables, and weights [slots_per_rank, ...]."""

    slots: Slots
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class BalanceStats:
    """The heaviest rank's load over the mean of all, when last measured; and what was moved."""

    mean: float = 1.0  # over layers
    worst: float = 1.0  # of all layers
    num_rebalances: int = 0  # in which anything moved
    num_moved: int = 0  # slots


def make_balancer(
    model: CausalLM, options: ExpertOptions, host: str | None = None
) -> "ExpertBalancer | None":
    """Of the model's layers on this rank; None if balancing is off or none of them has experts.

    `host` names the machine, for placements that respect nodes; None asks the machine itself.
    """
    if not options.enable_eplb:
        return None
    spmd = model.spmd
    group = spmd.group("ep")
    if group is None:
        raise ValueError("enable_eplb: the experts are on one rank")
    modules = dict(model.named_modules())
    layers = [BalancedLayer(slots, modules[path].by_slot()) for path, slots in spmd.slots.items()]
    if not layers:
        return None
    first = layers[0].slots.placement
    moe = cast(MoE, modules[next(iter(spmd.slots)).rpartition(".")[0]])
    solver = Solver(
        first.num_experts,
        first.num_ranks,
        first.num_slots - first.num_experts,
        num_nodes=_num_nodes(group, host or socket.gethostname(), layers[0].weights[0].device),
        num_groups=moe.gate.routing.n_group,
    )
    return ExpertBalancer(
        layers,
        group,
        solver,
        window_steps=options.eplb_window_steps,
        step_interval=options.eplb_step_interval,
    )


def _num_nodes(group: Group, host: str, device: torch.device) -> int:
    """Machines that the group's ranks stand on; 1 unless they divide the ranks in equal runs."""
    name = int.from_bytes(hashlib.blake2b(host.encode(), digest_size=7).digest(), "big")
    count = len(group.ranks)
    mine = torch.tensor([name], dtype=torch.int64, device=device)
    names = group.all_gather(mine, 0, [1] * count).tolist()
    runs = [len(list(run)) for _, run in itertools.groupby(names)]
    return len(runs) if len(runs) == len(set(names)) and len(set(runs)) == 1 else 1


class ExpertBalancer:
    """All ranks of an `ep` group make one alike and call `end_step` after each step."""

    def __init__(
        self,
        layers: Sequence[BalancedLayer],
        group: Group,
        solver: Solver,
        *,
        window_steps: int,
        step_interval: int,
    ) -> None:
        if not layers or step_interval < 1:
            raise ValueError(f"{len(layers)} layer(s), one rebalance in {step_interval} step(s)")
        self._layers, self._group, self.solver = layers, group, solver
        self._interval, self._lag = step_interval, step_interval // LAG
        device = layers[0].weights[0].device
        self._load = ExpertLoad(
            len(layers), solver.num_experts, window_steps=window_steps, device=device
        )
        for layer, counts in zip(layers, self._load.now, strict=True):
            layer.slots.count_into(counts)
        self._num_steps = 0
        self._measured = False
        self._solved: Future[list[ExpertPlacement]] | None = None  # on the first rank only
        self._due: deque[tuple[BalancedLayer, ExpertPlacement]] = deque()
        self.stats = BalanceStats()  # replaced as a whole; may be read from other threads

    def load(self) -> Tensor:
        """[layers, experts] int64: what this rank has counted; all ranks together count a token
        once for each of its experts."""
        return self._load.window()

    @torch.inference_mode()
    def end_step(self) -> None:
        """After each step, on the thread that runs them."""
        self._load.end_step()
        self._num_steps += 1
        at = self._num_steps % self._interval
        if at == 0:
            while self._due:
                self._move()
            self._measure()
        elif self._due:
            self._move()
        if at == self._lag and self._measured:
            self._decide()

    def _measure(self) -> None:
        loads: NDArray[Any] = self._group.all_reduce(self.load()).cpu().numpy()
        now = [layer.slots.placement for layer in self._layers]
        found = [placement.imbalance(row) for placement, row in zip(now, loads, strict=True)]
        self.stats = replace(self.stats, mean=float(np.mean(found)), worst=max(found))
        self._measured = True
        if self._group.index == 0:
            thread = ThreadPoolExecutor(1, "experts")
            self._solved = thread.submit(self.solver.solve, loads, now)
            thread.shutdown(wait=False)  # ends when it has solved

    def _decide(self) -> None:
        shape = (len(self._layers), self._layers[0].slots.placement.num_slots)
        words = np.zeros(shape, np.int32)
        if self._solved is not None:
            words = np.stack([placement.slots for placement in self._solved.result()])
        device = self._load.now.device
        words = self._group.broadcast(torch.from_numpy(words).to(device), 0).cpu().numpy()
        for layer, slots in zip(self._layers, words, strict=True):
            old = layer.slots.placement
            if not np.array_equal(old.slots, slots):
                self._due.append((layer, ExpertPlacement(slots, old.num_experts, old.num_ranks)))
        self._measured = False
        self.stats = replace(self.stats, num_rebalances=self.stats.num_rebalances + bool(self._due))

    def _move(self) -> None:
        layer, new = self._due.popleft()
        moved = exchange(layer.weights, layer.slots.placement, new, self._group)
        layer.slots.replace(new)
        self.stats = replace(self.stats, num_moved=self.stats.num_moved + moved)
