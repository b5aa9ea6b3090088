# SPDX-License-Identifier: MIT
"""The proof of the type checker: no wrong annotation gets through.

One module's boundary at a time is declared in every other way that its kind's rule allows. The
compile must refuse that, or the ranks must still compute what one rank does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.paged_run import PagedRun
from tokenspeed.models.build import build_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.checkpoint import Checkpoint
from tokenspeed.models.load_report import Place
from tokenspeed.models.loader import load_weights
from tokenspeed.models.tensor_check import TensorNames
from tokenspeed.spmd.check import spec_of
from tokenspeed.spmd.collectives import Variant
from tokenspeed.spmd.compile import SpmdPlan, compile_model
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.localise import localise
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import (
    Fused,
    Layout,
    ModuleSpec,
    Partial,
    Placement,
    Replicate,
    Shard,
    tokens,
)
from tokenspeed.spmd.rules import RULES, Types
from tokenspeed.spmd.simulate import run_ranks

PLACEMENTS = (Replicate(), Shard(0), Shard(1), Partial())
HIDDEN: list[Layout] = [{**dp, "tp": p} for dp in (tokens(), {}) for p in PLACEMENTS]
WEIGHTS: list[Layout] = [{"tp": placement} for placement in PLACEMENTS[:3]]
Built = tuple[CausalLM, TensorNames, SpmdPlan]
Change = dict[str, ModuleSpec]  # by path
Rows = dict[tuple[int, int], Tensor]  # by step and slot
NUM_SHARES = 10  # of the changes; the quick suite takes the first
CPU = torch.device("cpu")
IDS = torch.randint(VOCAB_SIZE, (24,), generator=torch.Generator().manual_seed(3)).tolist()
# By slot: a ragged prefill, a step in which slot 0 has nothing.
STEPS: list[dict[int, list[int]]] = [{0: IDS[:13], 1: IDS[7:12]}, {1: IDS[12:13]}]


@dataclass(frozen=True)
class Case:
    """A tiny model, and the mesh and the collectives with which its changed forms run."""

    family: str
    mesh: Mesh
    variant: Variant = field(default_factory=Variant)
    tied: bool = False

    def __str__(self) -> str:
        return f"{self.family}, {self.mesh}, {self.variant}"


CASES = [
    Case("deepseek_v3", Mesh(dp=2, tp=2, ep=4)),
    Case("deepseek_v3", Mesh(dp=2, tp=2, ep=4), Variant(split=True, dispatch=True)),
    Case("minimax_m2", Mesh(dp=2, tp=2, ep=2), Variant(dispatch=True)),
    Case("qwen3", Mesh(tp=2, pp=2), tied=True),
]


def other_specs(spec: ModuleSpec) -> Iterator[ModuleSpec]:
    """Every other boundary that the rule of the module's kind does not refuse by itself."""
    if spec.kind == "experts":
        yield from other_experts(spec)
        return
    choices = [[laid_out(old, new) for new in WEIGHTS] for old in spec.weights.values()]
    for inputs, outputs, *weights in product(HIDDEN, HIDDEN, *choices):
        laid = dict(zip(spec.weights, weights, strict=True))
        changed = ModuleSpec(spec.kind, inputs, outputs, laid)  # type: ignore[arg-type]
        if spec.kind == "composite" or all(obeys(changed, axis) for axis in ("tp", "dp")):
            yield changed


def laid_out(old: Layout | Fused, new: Layout) -> Layout | Fused:
    """A fused weight keeps its parts unless it is divided along another dimension."""
    if not isinstance(old, Fused) or new["tp"] not in (Replicate(), Shard(old.dim)):
        return new
    if new["tp"] == Replicate():
        return replace(old, parts=tuple(replace(part, layout={}) for part in old.parts))
    return old


def obeys(spec: ModuleSpec, axis: str) -> bool:
    """Whether the rule of its kind allows it, with a bias or without one."""

    def on_axis(layout: Layout | Fused) -> Placement:
        if isinstance(layout, Fused):
            divided = axis == "tp" and bool(layout.parts[0].layout)
            return Shard(layout.dim) if divided else Replicate()
        return layout.get(axis, Replicate())

    weights = {name: on_axis(layout) for name, layout in spec.weights.items()}
    boundary = on_axis(spec.inputs), on_axis(spec.outputs)
    with_bias = RULES[spec.kind](Types(*boundary, weights))
    without = {name: weight for name, weight in weights.items() if name != "bias"}
    return with_bias is None or RULES[spec.kind](Types(*boundary, without)) is None


def other_experts(spec: ModuleSpec) -> Iterator[ModuleSpec]:
    """Divided over other axes than `ep` and `etp`, or over none, with the sums that this makes."""
    w13 = spec.weights["w13"]
    assert isinstance(w13, Fused)
    for outer, inner in product(("ep", "tp", "dp", None), ("etp", "tp", None)):
        rows: Layout = {outer: Shard(0)} if outer else {}
        first: Layout = {**rows, inner: Shard(1)} if inner else rows
        second: Layout = {**rows, inner: Shard(2)} if inner else rows
        parts = tuple(replace(part, layout=first) for part in w13.parts)
        weights: dict[str, Layout | Fused] = {"w13": replace(w13, parts=parts), "w2": second}
        summed: Layout = {axis: Partial() for axis in (outer, inner) if axis}
        for inputs, outputs in ({}, summed), (tokens(), {**tokens(), **summed}):
            yield ModuleSpec("experts", inputs, outputs, weights)


def paths(model: CausalLM) -> list[str]:
    """The modules of the last layer and of a dense block, and what stands around the layers."""
    chosen = "model.layers.0.mlp", f"model.layers.{model.config.num_layers - 1}"
    modules = [p for p, m in model.named_modules() if not isinstance(m, nn.ModuleList)]
    rest = [p for p in modules if not p.startswith("model.layers.") or p == "model.layers.0"]
    return rest + [p for p in modules if p.startswith(chosen)]


def changes(model: CausalLM) -> Iterator[Change]:
    for path in paths(model):
        for spec in other_specs(spec_of(path, model.get_submodule(path))):
            yield {path: spec}


def compiled(folder: Path, case: Case, change: Change | None = None) -> Built:
    """`ValueError`: the compile refuses the change."""
    model, names = build_model(folder, torch.float64, CPU, 64)
    for path, spec in (change or {}).items():
        model.get_submodule(path).spec = spec  # type: ignore[assignment]
    return model, names, compile_model(model, case.mesh, variant=case.variant)


def drive(built: Built, folder: Path, rank: int, communicator: Communicator | None) -> Rows:
    """The logits of the last token of each of this rank's slots, in each step."""
    model, names, plan = built
    mesh = plan.mesh
    model.spmd = localise(model, plan, rank, communicator)
    load_weights(model, Checkpoint(folder), names, None, Place(rank, mesh.num_ranks))
    paged = PagedRun(model)
    found: Rows = {}
    for at, step in enumerate(STEPS):
        counts = [0] * mesh.dp
        for slot, ids in step.items():
            counts[slot % mesh.dp] += len(ids)
        mine = {s: ids for s, ids in step.items() if s % mesh.dp == mesh.index("dp", rank)}
        model.spmd.begin_step(counts)
        hidden = model.forward(paged.batch(mine), paged.caches)
        if model.spmd.samples:
            ends = torch.tensor([len(ids) for ids in mine.values()]).cumsum(0).long() - 1
            rows = model.logits(hidden[ends])
            found |= {(at, slot): row for slot, row in zip(mine, rows, strict=True)}
    return found


def check(folder: Path, case: Case, change: Change, want: Rows) -> int:
    """How many rows were compared; `ValueError`: the compile refuses the change."""
    compiled(folder, case, change)

    def work(communicator: Communicator) -> Rows:
        return drive(compiled(folder, case, change), folder, communicator.rank, communicator)

    compared = 0
    try:
        for found in run_ranks(case.mesh.num_ranks, work, timeout_s=20):
            for key, row in found.items():
                torch.testing.assert_close(row, want[key], atol=1e-9, rtol=0)
                compared += 1
    except Exception as error:
        raise AssertionError(f"{change} is not refused: {error!r}") from error
    return compared


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "share", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, NUM_SHARES))]
)
def test_what_is_not_refused_computes_the_same(case: Case, share: int, tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path, case.family, num_hidden_layers=2, tie_word_embeddings=case.tied
    )
    want = drive(compiled(folder, replace(case, mesh=Mesh())), folder, 0, None)
    num_refused = num_equal = 0
    for change in [*changes(compiled(folder, case)[0])][share::NUM_SHARES]:
        try:
            num_equal += check(folder, case, change, want) > 0
        except ValueError:
            num_refused += 1
    assert num_equal > 0
    assert num_refused > 20


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("inputs", [{}, tokens(tp=Shard(0))], ids=["all tokens", "some tokens"])
def test_tokens_that_are_not_ones_own_do_not_travel(inputs: Layout, tmp_path: Path) -> None:
    """A sparse block that gets other tokens gathers them, whatever the variant says."""
    case = CASES[2]
    folder = make_checkpoint(tmp_path, case.family, num_hidden_layers=2)
    want = drive(compiled(folder, replace(case, mesh=Mesh())), folder, 0, None)
    model, _, _ = compiled(folder, case)
    block = "model.layers.1.mlp"
    old = spec_of(block, model.get_submodule(block))
    gate = spec_of(f"{block}.gate", model.get_submodule(f"{block}.gate"))
    change = {
        block: replace(old, inputs=inputs),
        f"{block}.gate": replace(gate, inputs=inputs, outputs=inputs),
    }
    assert check(folder, case, change, want) > 0
