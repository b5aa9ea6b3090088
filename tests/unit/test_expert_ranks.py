# SPDX-License-Identifier: MIT
"""Experts that move while a model runs: virtual ranks against one rank, in float64."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.paged_run import PagedRun
from tokenspeed.config import EngineConfig, ExpertOptions
from tokenspeed.execution.expert_balancer import ExpertBalancer, make_balancer
from tokenspeed.models.build import Ranks, load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.spmd.collectives import Variant
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.simulate import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-9
CPU = torch.device("cpu")
NUM_STEPS, NUM_SLOTS = 12, 4
EAGER = ExpertOptions(enable_eplb=True, eplb_window_steps=2, eplb_step_interval=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "deepseek_v3")


@dataclass
class Run:
    """One rank's logits of each step by slot, and what its balancer saw."""

    samples: bool
    steps: list[dict[int, Tensor]]
    balancer: ExpertBalancer | None
    loads: list[Tensor]  # after each step, [layers here, experts]


def sequences() -> list[list[int]]:
    """Few distinct ids a sequence, other ones later on: skewed loads that change."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for slot in range(NUM_SLOTS):
        early, late = torch.randint(VOCAB_SIZE, (2, 2), generator=generator).tolist()
        found.append([early[i % 2] for i in range(20 + slot)] + [late[i % 2] for i in range(30)])
    return found


def pieces(step: int) -> dict[int, slice]:
    """Prefills of 6 tokens first, then decodes; slot 0 pauses in between."""
    if step < 4:
        return {s: slice(6 * step, 6 * step + 6) for s in range(NUM_SLOTS) if s or step != 2}
    at = 24 + step - 4
    return {s: slice(at, at + 1) for s in range(1, NUM_SLOTS)}


def run(model: CausalLM, mesh: Mesh, dp: int, options: ExpertOptions) -> Run:
    """Steps of all slots whose dp rank this is, each followed by the balancer's work."""
    paged, ids = PagedRun(model), sequences()
    balancer = make_balancer(model, options)
    result = Run(model.spmd.samples, [], balancer, [])
    for step in range(NUM_STEPS):
        counts = [0] * mesh.dp
        for slot, part in pieces(step).items():
            counts[slot % mesh.dp] += len(ids[slot][part])
        model.spmd.begin_step(counts)
        mine = {s: ids[s][part] for s, part in pieces(step).items() if s % mesh.dp == dp}
        hidden = model.forward(paged.batch(mine), paged.caches)
        logits = model.logits(hidden) if model.spmd.samples else hidden
        rows = torch.split(logits, [len(i) for i in mine.values()]) if mine else ()
        result.steps.append(dict(zip(mine, rows, strict=True)))
        if balancer is not None:
            result.loads.append(balancer.load())
            balancer.end_step()
    return result


def run_mesh(
    checkpoint: Path, mesh: Mesh, variant: Variant, redundant: int, options: ExpertOptions = EAGER
) -> list[Run]:
    def work(communicator: Communicator) -> Run:
        rank = communicator.rank
        ranks = Ranks(mesh, rank, communicator, num_redundant_experts=redundant, variant=variant)
        model = load_model(checkpoint, torch.float64, CPU, 192, ranks=ranks)
        return run(model, mesh, mesh.index("dp", rank), options)

    return run_ranks(mesh.num_ranks, work)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Run:
    """One rank, without balancing; its loads are those of a router that is listened to."""
    model = load_model(checkpoint, torch.float64, CPU, 192)
    loads: list[Any] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            _listen(layer.mlp.gate, loads)
    result = run(model, Mesh(), 0, ExpertOptions())
    per_step = torch.stack(loads).view(NUM_STEPS, -1, loads[0].numel())
    result.loads = list(per_step)
    return result


def _listen(gate: Any, loads: list[Any]) -> None:
    route = gate.forward

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = route(x)
        loads.append(torch.bincount(ids.flatten(), minlength=gate.routing.num_experts))
        return weights, ids

    gate.forward = forward


MESHES = [
    ("ep=2", 2),
    ("ep=4", 4),
    ("tp=2,ep=2", 2),
    ("tp=4,ep=2", 4),
    ("dp=2,ep=4", 8),
    ("dp=2,tp=2,ep=4", 4),
    ("dp=2,tp=2,ep=2", 2),
    ("pp=2,ep=2", 2),
    ("ep=2", 0),
]


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize(("mesh", "redundant"), MESHES)
def test_no_logit_changes_when_experts_move(
    checkpoint: Path, expected: Run, mesh: str, redundant: int, dispatch: bool
) -> None:
    runs = run_mesh(checkpoint, Mesh.parse(mesh), Variant(dispatch=dispatch), redundant)
    compared = 0
    for one in runs:
        assert one.balancer is not None
        assert one.balancer.stats.num_rebalances >= 2
        assert one.balancer.stats.num_moved > 4
        for step, want in zip(one.steps, expected.steps, strict=True):
            for slot, logits in step.items():
                if one.samples:
                    torch.testing.assert_close(logits, want[slot], atol=TOLERANCE, rtol=0)
                    compared += len(logits)
    assert compared >= sum(len(rows) for step in expected.steps for rows in step.values())


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("mesh", ["ep=4", "tp=4,ep=2", "dp=2,tp=2,ep=4", "dp=4,ep=2"])
def test_every_routed_token_is_counted_once(
    checkpoint: Path, expected: Run, mesh: str, dispatch: bool
) -> None:
    options = ExpertOptions(enable_eplb=True, eplb_window_steps=800)
    parsed = Mesh.parse(mesh)
    runs = run_mesh(checkpoint, parsed, Variant(dispatch=dispatch), 0, options)
    for ranks in parsed.groups(parsed.axis_atoms("ep")):
        counted = torch.stack([runs[rank].loads[-1] for rank in ranks]).sum(0)
        assert torch.equal(counted, torch.stack(expected.loads).sum(0))


def test_off_means_nothing_is_counted(checkpoint: Path) -> None:
    runs = run_mesh(checkpoint, Mesh(ep=2), Variant(), 0, ExpertOptions())
    assert [one.balancer for one in runs] == [None, None]


def test_one_rank_has_nothing_to_balance(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="the experts are on one rank"):
        make_balancer(load_model(checkpoint, torch.float64, CPU, 192), EAGER)


@pytest.mark.parametrize(
    ("hosts", "num_nodes"),
    [("aaaa", 1), ("aabb", 2), ("abcd", 4), ("abab", 1), ("abbb", 1), ("abba", 1)],
)
def test_nodes_are_runs_of_equal_length(checkpoint: Path, hosts: str, num_nodes: int) -> None:
    def work(communicator: Communicator) -> tuple[int, int]:
        ranks = Ranks(Mesh(ep=4), communicator.rank, communicator)
        model = load_model(checkpoint, torch.float64, CPU, 192, ranks=ranks)
        balancer = make_balancer(model, EAGER, hosts[communicator.rank])
        assert balancer is not None
        return balancer.solver.num_nodes, balancer.solver.num_groups

    assert run_ranks(4, work) == [(num_nodes, 4)] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_eplb": True}, "enable_eplb needs expert_parallel_size above 1"),
        ({"num_redundant_experts": 2}, "num_redundant_experts needs enable_eplb"),
        ({"num_redundant_experts": -1}, "num_redundant_experts must be a number of at least 0"),
        ({"eplb_window_steps": 0}, "eplb_window_steps must be a number of at least 1"),
        ({"eplb_step_interval": 0}, "eplb_step_interval must be a number of at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.of(**options)
