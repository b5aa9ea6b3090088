# SPDX-License-Identifier: MIT
"""A second model as drafter. One that is the target itself must be right every time."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.drafting import Drafting
from tokenspeed.execution.speculation.draft_model import draft_model_drafter
from tokenspeed.models.build import load_model
from tokenspeed.models.draft_model import load_draft_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PROMPTS = [[(a * i + i * i // 7) % 500 for i in range(40 + a)] for a in range(1, 5)]
ALL = 10_000


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("target"), request.param)


def drafting(folder: Path, temperatures: dict[int, float], *, max_depth: int = 8) -> Drafting:
    """The target drafts for itself."""
    target = load_model(folder, torch.float32, CPU, 192)
    model = load_draft_model(folder, target, folder)
    return Drafting(target, draft_model_drafter(model, max_depth), temperatures)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_agrees_with_itself(folder: Path, temperature: float) -> None:
    run = drafting(folder, {0: temperature, 1: temperature, 3: temperature / 2})
    for slot in (0, 1, 3):
        run.begin(slot, PROMPTS[slot])
    run.step({0: 17, 1: ALL}, propose=4)
    run.step({0: 20, 1: ALL, 3: 9}, propose=4)
    for step in range(12):
        depths = {0: step % 4, 1: 5, 3: 3 if step > 4 else 0}
        run.step({0: ALL, 1: ALL, 3: ALL}, propose=depths)
    assert run.proposed > 80
    waiting = sum(len(drafts) for drafts in run.drafts.values())
    assert run.accepted == run.proposed - waiting
