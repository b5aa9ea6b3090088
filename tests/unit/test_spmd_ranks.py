# SPDX-License-Identifier: MIT
"""Every model on every mesh of the support matrix: simulated ranks against one rank, in float64."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.paged_run import PagedRun
from tokenspeed.models.build import Ranks, load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.spmd.collectives import Variant
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.simulate import VirtualCommunicator, run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-9
MESHES = [
    "tp=2",
    "tp=4",
    "tp=8",
    "ep=2",
    "ep=4",
    "dp=2,ep=4",
    "dp=2,tp=2,ep=4",
    "dp=2,tp=2,ep=2",
    "dp=4,ep=2",
    "tp=2,ep=2",
    "tp=4,ep=2",
    "dp=2,tp=2",
    "pp=2",
    "pp=2,tp=2",
    "pp=2,dp=2,ep=2",
]
VARIANTS = [Variant(split=s, dispatch=d) for s in (False, True) for d in (False, True)]
SIZES = {"num_attention_heads": 8, "hidden_size": 64}
WITH_EXPERTS = {"deepseek_v2", "deepseek_v3", "minimax_m2", "qwen3_moe"}

# A ragged prefill, a mixed batch with a chunk and decodes, a step in which some ranks have nothing,
# a prefix hit of slot 3 on the pages of slot 1, decodes.
Step = dict[int, slice]
STEPS: list[Step] = [
    {0: slice(0, 21), 1: slice(0, 34), 2: slice(0, 1)},
    {1: slice(34, 40), 0: slice(21, 22), 2: slice(1, 2)},
    {1: slice(40, 41)},
    {3: slice(32, 37), 0: slice(22, 23)},
    {0: slice(23, 24), 1: slice(41, 42), 2: slice(2, 3), 3: slice(37, 38)},
    {2: slice(3, 4)},
]


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randint(VOCAB_SIZE, (48,), generator=generator).tolist() for _ in range(4)]
    made[3][:32] = made[1][:32]
    return made


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(SIZES)
    if request.param.startswith("deepseek"):
        sizes["num_key_value_heads"] = 8
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(folder, request.param, **sizes)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[dict[int, Tensor]]:
    model = load_model(checkpoint, torch.float64, torch.device("cpu"), 192)
    return drive(model, 1, 0)


def home(slot: int, num_dp: int) -> int:
    """The dp rank that has the slot; 3 shares pages with 1."""
    return (1 if slot == 3 else slot) % num_dp


def drive(model: CausalLM, num_dp: int, dp: int) -> list[dict[int, Tensor]]:
    """Each step's logits by slot, of the slots of one dp rank."""
    run, ids = PagedRun(model), sequences()
    found = []
    for step in STEPS:
        counts = [0] * num_dp
        for slot, part in step.items():
            counts[home(slot, num_dp)] += len(ids[slot][part])
            if slot == 3 and run.lengths[3] == 0:
                run.adopt(3, 1, 32)
        model.spmd.begin_step(counts)
        mine = {s: ids[s][part] for s, part in step.items() if home(s, num_dp) == dp}
        batch = run.batch(mine)
        hidden = model.forward(batch, run.caches)
        found.append({})
        if model.spmd.samples:
            rows = torch.split(model.logits(hidden), [len(i) for i in mine.values()] or [0])
            found[-1].update(zip(mine, rows, strict=False))
    return found


def check(checkpoint: Path, expected: list[dict[int, Tensor]], mesh: Mesh, variant: Variant) -> int:
    """Runs all ranks; returns how many rows of logits were compared."""

    def work(communicator: Communicator) -> list[dict[int, Tensor]]:
        ranks = Ranks(mesh, communicator.rank, communicator, variant=variant)
        model = load_model(checkpoint, torch.float64, torch.device("cpu"), 192, ranks=ranks)
        return drive(model, mesh.dp, mesh.index("dp", communicator.rank))

    compared = 0
    for steps in run_ranks(mesh.num_ranks, work):
        for step, want in zip(steps, expected, strict=True):
            for slot, logits in step.items():
                torch.testing.assert_close(logits, want[slot], atol=TOLERANCE, rtol=0)
                compared += len(logits)
    return compared


def combinations() -> list[Any]:
    """Every mesh with every variant; the quick suite takes each mesh with one of them in turn."""
    return [
        pytest.param(mesh, variant, marks=[] if i % len(VARIANTS) == j else [pytest.mark.full])
        for i, mesh in enumerate(MESHES)
        for j, variant in enumerate(VARIANTS)
    ]


@pytest.mark.parametrize(("mesh", "variant"), combinations())
def test_ranks_compute_what_one_rank_does(
    checkpoint: Path, expected: list[dict[int, Tensor]], mesh: str, variant: Variant
) -> None:
    dense = not any(checkpoint.name.startswith(name) for name in WITH_EXPERTS)
    if dense and "ep" in mesh:
        with pytest.raises(ValueError, match="has no experts for the axis ep"):
            check(checkpoint, expected, Mesh.parse(mesh), variant)
        return
    assert check(checkpoint, expected, Mesh.parse(mesh), variant) > 0


@pytest.mark.parametrize("variant", [Variant(), Variant(split=True)], ids=str)
def test_ranks_call_what_the_plan_says(tmp_path: Path, variant: Variant) -> None:
    folder, mesh = make_checkpoint(tmp_path, "llama"), Mesh(tp=2)

    def work(communicator: VirtualCommunicator) -> tuple[Counter[str], Counter[str], int, int]:
        ranks = Ranks(mesh, communicator.rank, communicator, variant=variant)
        model = load_model(folder, torch.float32, torch.device("cpu"), 192, ranks=ranks)
        begin = len(communicator.calls)
        model.spmd.begin_step([24])
        batch = PagedRun(model).batch({0: sequences()[0][:24]})
        run = PagedRun(model)
        model.logits(model.forward(batch, run.caches)[-1:])
        calls = communicator.calls[begin:]
        rows = model.spmd.plan.collectives(0, itemsize=4)
        counts = {"tokens": 24, "all tokens": 24, "sampled": 1}
        planned = sum(int(row.bytes_per_row) * counts[row.rows] for row in rows)
        found = Counter(call.kind for call in calls), Counter(row.kind for row in rows)
        return *found, sum(call.num_bytes for call in calls), planned

    for made, planned, made_bytes, planned_bytes in run_ranks(2, work):
        assert made == planned
        assert made_bytes == planned_bytes
