# SPDX-License-Identifier: MIT
"""The planned bytes against real builds of small models, on every rank of simulated meshes."""

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tokenspeed.execution.kv_cache import KVCache
from tokenspeed.kernels import force_backend
from tokenspeed.models.build import Ranks, load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.planner.catalog import describe
from tokenspeed.planner.devices import DEVICES
from tokenspeed.planner.estimate import Estimate, Load, estimate
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.simulate import VirtualCommunicator, run_ranks

TOLERANCE = 0.02
NUM_PAGES, PAGE_SIZE = 5, 16
SIZES = {
    "num_attention_heads": 8,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}
DENSE = ["tp=1", "tp=8", "dp=2,tp=2", "pp=2,tp=2", "pp=4"]
SPARSE = [*DENSE, "tp=2,ep=4", "dp=2,tp=2,ep=2", "dp=4,ep=4"]
FAMILIES = {"deepseek_v3": SPARSE, "qwen3_moe": SPARSE, "qwen3": DENSE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        sizes = dict(SIZES)
        if family.startswith("deepseek"):
            sizes["num_key_value_heads"] = 8
        made[family] = make_checkpoint(tmp_path_factory.mktemp(family), family, **sizes)
    return made


def real_bytes(model: CausalLM) -> tuple[int, int, int]:
    """(weights, rotary tables, keys and values) of one rank, from the tensors themselves."""
    weights = {id(p): p.nbytes for p in model.parameters() if not p.is_meta}
    tables = {id(m.cos_sin): m.cos_sin.nbytes for m in model.modules() if hasattr(m, "cos_sin")}
    specs = model.cache_specs()
    device = torch.device("cpu")
    cache = KVCache(specs, num_pages=NUM_PAGES, page_size=PAGE_SIZE, device=device)
    pages = sum(tensor.nbytes for layer in cache.layers for tensor in layer)
    return sum(weights.values()), sum(tables.values()), pages


def planned(folder: Path, mesh: Mesh, redundant: int = 0) -> Estimate:
    config = json.loads((folder / "config.json").read_text())
    load = Load(batch=1, context=64, page_size=PAGE_SIZE, redundant_experts=redundant)
    return estimate(describe(folder.name, config), mesh, DEVICES["h200"], load)


def built(folder: Path, mesh: Mesh, redundant: int = 0) -> list[tuple[int, int, int]]:
    def build(communicator: VirtualCommunicator) -> tuple[int, int, int]:
        ranks = Ranks(mesh, communicator.rank, communicator, num_redundant_experts=redundant)
        with force_backend("reference"):  # weights as devices hold them, in no CPU's panels
            return real_bytes(load_model(folder, None, torch.device("cpu"), ranks=ranks))

    return run_ranks(mesh.num_ranks, build)


def check(folder: Path, mesh: Mesh, redundant: int = 0) -> None:
    found, real = planned(folder, mesh, redundant), built(folder, mesh, redundant)
    room = found.room
    stages = [real[s * mesh.stage_ranks : (s + 1) * mesh.stage_ranks] for s in range(mesh.pp)]
    for stage, ranks in enumerate(stages):
        fullest = max(weights for weights, _, _ in ranks)
        assert found.workload.weight_bytes(stage) == pytest.approx(fullest, rel=TOLERANCE)
    assert room.weight_bytes == pytest.approx(max(w for w, _, _ in real), rel=TOLERANCE)
    assert room.table_bytes == pytest.approx(max(t for _, t, _ in real), rel=TOLERANCE)
    pages = room.kv_bytes_per_token * PAGE_SIZE * NUM_PAGES
    assert pages == pytest.approx(max(p for _, _, p in real), rel=TOLERANCE)


@pytest.mark.parametrize(("family", "mesh"), [(f, m) for f in FAMILIES for m in FAMILIES[f]])
def test_planned_bytes_are_those_of_a_build(
    folders: dict[str, Path], family: str, mesh: str
) -> None:
    check(folders[family], Mesh.parse(mesh))


def test_redundant_experts_are_counted(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    check(folder, Mesh(ep=2), redundant=2)
    less, more = (planned(folder, Mesh(ep=2), n).room.weight_bytes for n in (0, 2))
    assert less < more
