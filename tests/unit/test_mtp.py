# SPDX-License-Identifier: MIT
"""What drafters hear of a model, and MTP layers: loading, numbers, drafts. All on tiny models."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import make_checkpoint, reference_model
from tests.paged_run import PagedRun
from tokenspeed.models.build import Ranks, load_model
from tokenspeed.spmd.collectives import Variant
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.simulate import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
IDS = [(7 * i + i * i // 3) % 250 for i in range(24)]


def heard(folder: Path, ranks: Ranks | None = None) -> list[Tensor]:
    """The streams after layers 0 and 2, of a prefill in two chunks."""
    model = load_model(folder, torch.float64, CPU, 192, ranks=ranks)
    model.aux_layers = (0, 2)
    run = PagedRun(model)
    found = []
    for piece in (IDS[:15], IDS[15:]):
        model.spmd.begin_step([len(piece)])
        run.step({3: piece})
        found.append(torch.stack(model.aux_hidden))
    return list(torch.cat(found, 1))


def test_a_model_tells_the_residual_stream_after_chosen_layers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=4)
    reference = reference_model(folder).double()
    states = reference(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    for mine, layer in zip(heard(folder), (0, 2), strict=True):
        torch.testing.assert_close(mine, states[layer + 1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_ranks_tell_the_whole_residual_stream(tmp_path: Path, split: bool) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    expected = torch.stack(heard(folder))

    def on_rank(communicator: Communicator) -> Tensor:
        mesh, variant = Mesh(tp=2), Variant(split=split)
        return torch.stack(
            heard(folder, Ranks(mesh, communicator.rank, communicator, variant=variant))
        )

    for mine in run_ranks(2, on_rank):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layers", [(2, 0), (0, 3), (1, 1), (-1,)])
def test_layers_to_hear_must_be_there_and_rise(tmp_path: Path, layers: tuple[int, ...]) -> None:
    model = load_model(make_checkpoint(tmp_path, "llama"), torch.float32, CPU, 192)
    with pytest.raises(ValueError, match="aux_layers"):
        model.aux_layers = layers
