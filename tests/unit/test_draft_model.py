# SPDX-License-Identifier: MIT
"""A second model as drafter. One that is the target itself must be right every time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.drafted_answers import answers
from tests.drafting import Drafting
from tokenspeed.errors import ModelLoadError
from tokenspeed.execution.speculation.draft_model import draft_model_drafter
from tokenspeed.models.build import Ranks, load_model
from tokenspeed.models.draft_model import check_same_tokens, load_draft_model, ranks_beside
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.simulate import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PROMPTS = [[(a * i + i * i // 7) % 500 for i in range(40 + a)] for a in range(1, 6)]
ALL = 10_000


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("target"), request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen"), "qwen3", tokenizer=True)


def drafting(
    folder: Path, temperature: float, ranks: Ranks | None = None, tp: int = 1, depth: int = 8
) -> Drafting:
    """The target drafts for itself."""
    target = load_model(folder, torch.float32, CPU, 192, ranks=ranks)
    model = load_draft_model(folder, target, folder, ranks, tp)
    warm = {slot: temperature if slot != 3 else temperature / 2 for slot in range(5)}
    return Drafting(target, draft_model_drafter(model, depth), warm)


def drive(run: Drafting) -> None:
    """Chunks, mixed rows, depths that change, none at all."""
    for slot in (0, 1, 3):
        run.begin(slot, PROMPTS[slot])
    run.step({0: 17, 1: ALL}, propose=4)
    run.step({0: 20, 1: ALL, 3: 9}, propose=4)
    for step in range(10):
        depths = {0: step % 4, 1: 5, 3: 3 if step > 4 else 0}
        run.step({0: ALL, 1: ALL, 3: ALL}, propose=depths)


def check_always_right(run: Drafting, at_least: int) -> None:
    waiting = sum(len(drafts) for drafts in run.drafts.values())
    assert run.proposed >= at_least
    assert run.accepted == run.proposed - waiting


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_agrees_with_itself(folder: Path, temperature: float) -> None:
    run = drafting(folder, temperature)
    drive(run)
    check_always_right(run, 80)


def test_drafts_of_others_that_are_wrong_leave_nothing_behind(qwen: Path) -> None:
    run = drafting(qwen, 1.0)
    run.begin(2, PROMPTS[2])
    for step in range(12):
        run.step({2: ALL}, propose=3)
        right = run.proposed
        run.drafts[2] = [*run.drafts[2][: step % 3], 499, 498, 497][: 1 + step % 4]
        before, kept = run.accepted, min(step % 3, 1 + step % 4)
        run.step({2: ALL}, propose=2)
        assert run.accepted == before + kept
        assert run.proposed == right + 2
        before = run.accepted
        run.step({2: ALL})
        assert run.accepted == before + 2


def test_a_prefix_hit_brings_what_nobody_asked_drafts_of(folder: Path) -> None:
    """Decoded without a draft, longer than the backlog: full pages are complete all the same."""
    run = drafting(folder, 0.0)
    run.begin(0, PROMPTS[0][:14])
    for _ in range(70):
        run.step({0: ALL})
    run.begin(1, run.ids[0][:83], hit=(0, 80))
    run.step({1: ALL}, propose=8)
    run.step({1: ALL, 0: ALL}, propose=8)
    for _ in range(4):
        run.step({1: ALL, 0: ALL}, propose=6)
    check_always_right(run, 60)


def test_a_retracted_request_goes_on(folder: Path) -> None:
    run = drafting(folder, 1.0)
    run.begin(4, PROMPTS[4])
    for _ in range(3):
        run.step({4: ALL}, propose=5)
    run.begin(4, run.ids[4])
    run.proposed = run.accepted = 0
    run.step({4: 30}, propose=5)
    for _ in range(4):
        run.step({4: ALL}, propose=5)
    check_always_right(run, 20)


def test_drafts_need_no_pages_of_the_sequence(qwen: Path) -> None:
    """A chain that runs over the last page writes to pages of the drafter's own."""
    run = drafting(qwen, 0.0, depth=40)
    for slot in (0, 1):
        run.begin(slot, PROMPTS[0][:29])
    own = {slot: run.run.page_table[slot].clone() for slot in (0, 1)}
    for slot in (0, 1):
        run.run.page_table[slot, 2:] = 1 << 30  # not given yet
    run.step({0: ALL, 1: ALL}, propose=40)
    assert [len(drafts) for drafts in run.drafts.values()] == [40, 40]
    for slot in (0, 1):
        assert (run.run.page_table[slot, 2:] == 1 << 30).all()
        run.run.page_table[slot] = own[slot]
    run.step({0: ALL, 1: ALL}, propose=30)
    run.step({0: ALL, 1: ALL})
    assert run.accepted == 140


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_draft_alike(qwen: Path, tp: int) -> None:
    """Each with the whole draft model, or with a part of it."""

    def on_rank(communicator: Communicator) -> list[list[int]]:
        run = drafting(qwen, 1.0, Ranks(Mesh(tp=2), communicator.rank, communicator), tp)
        drive(run)
        check_always_right(run, 80)
        return [run.ids[slot] for slot in (0, 1, 3)]

    first, second = run_ranks(2, on_rank)
    assert first == second


def test_contexts_beyond_the_draft_models_own(tmp_path: Path, qwen: Path) -> None:
    """Its drafts there are poor; the target goes on."""
    short = make_checkpoint(tmp_path, "qwen3", max_position_embeddings=64)
    target = load_model(qwen, torch.float32, CPU, 192)
    model = load_draft_model(short, target, qwen)
    assert model.max_position == 64
    run = Drafting(target, draft_model_drafter(model, 4))
    run.begin(0, PROMPTS[0] + PROMPTS[1])
    for _ in range(4):
        run.step({0: ALL}, propose=4)
    assert len(run.drafts[0]) == 4


def test_another_family_in_its_own_dtype(tmp_path: Path, qwen: Path) -> None:
    other = make_checkpoint(tmp_path, "llama", hidden_size=32, num_hidden_layers=1)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"dtype": "bfloat16"}))
    target = load_model(qwen, torch.float32, CPU, 192)
    drafter = draft_model_drafter(load_draft_model(other, target, qwen), 3)
    assert [spec.dtype for spec in drafter.cache_specs] == [torch.bfloat16]
    run = Drafting(target, drafter)
    run.begin(0, PROMPTS[0])
    for _ in range(3):
        run.step({0: ALL}, propose=3)
    assert run.proposed == 9


def test_another_size_of_vocabulary_is_refused(tmp_path: Path, qwen: Path) -> None:
    other = make_checkpoint(tmp_path, "qwen3", vocab_size=500)
    target = load_model(qwen, torch.float32, CPU, 192)
    with pytest.raises(ModelLoadError, match="vocab_size: 500 tokens, and the target has 512"):
        load_draft_model(other, target, qwen)


def test_an_engine_accepts_what_its_own_model_drafts(qwen: Path) -> None:
    """Through chunks, prefix hits and retractions, greedy and sampled."""
    expected, _ = answers(qwen, method="off")
    config = {"model": str(qwen), "num_speculative_tokens": 3, "adaptive": False}
    found, stats = answers(qwen, method="draft_model", **config)
    assert found == expected
    assert stats.speculation is not None
    drafts = stats.speculation.drafters[0]
    assert drafts.num_accepted_tokens == drafts.num_draft_tokens > 200


def write_tokens(folder: Path, model: Any, added: Any = None) -> Path:
    folder.mkdir()
    text = json.dumps({"model": {"vocab": model}, "added_tokens": added})
    (folder / "tokenizer.json").write_text(text)
    return folder


def test_other_tokens_are_refused_by_the_first(tmp_path: Path) -> None:
    added = [{"id": 3, "content": "<end>"}]
    mine = write_tokens(tmp_path / "a", {"x": 0, "y": 1, "z": 2}, added)
    check_same_tokens(mine, write_tokens(tmp_path / "b", {"z": 2, "y": 1, "x": 0}, added))
    check_same_tokens(mine, write_tokens(tmp_path / "c", [["x", 0], ["y", -1.5], ["z", -2]], added))
    check_same_tokens(mine, tmp_path)  # which has none
    other = write_tokens(tmp_path / "d", {"x": 0, "z": 1, "y": 2}, added)
    with pytest.raises(ModelLoadError, match="token 1 is 'y', and the target's is 'z'"):
        check_same_tokens(mine, other)
    fewer = write_tokens(tmp_path / "e", {"x": 0, "y": 1, "z": 2})
    with pytest.raises(ModelLoadError, match="token 3 is '<end>', and the target's is none"):
        check_same_tokens(mine, fewer)
    for number, broken in enumerate((None, 3, {"x": "y"}, [3])):
        with pytest.raises(ModelLoadError, match="holds no vocabulary"):
            check_same_tokens(mine, write_tokens(tmp_path / str(number), broken))


def test_ranks_that_can_share_a_drafter() -> None:
    assert ranks_beside(Ranks(Mesh(ep=4), 3), 1).mesh == Mesh()
    assert ranks_beside(Ranks(Mesh(tp=4, ep=2), 3), 4).mesh == Mesh(tp=4)
    for mesh in (Mesh(dp=2), Mesh(pp=2)):
        with pytest.raises(ValueError, match="run with dp 1 and pp 1"):
            ranks_beside(Ranks(mesh), 1)
    with pytest.raises(ValueError, match="divided over all 4 of them, not over 2"):
        ranks_beside(Ranks(Mesh(tp=2, ep=4)), 2)
