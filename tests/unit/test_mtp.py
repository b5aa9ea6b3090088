# SPDX-License-Identifier: MIT
"""What drafters hear of a model, and MTP layers: loading, numbers, drafts. All on tiny models."""

import copyreg
import inspect
from collections.abc import Iterator
from concurrent.futures import process
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import linear

import tokenspeed
from tests.checkpoints import make_checkpoint, reference_model
from tests.drafting import Drafting
from tests.paged_run import PagedRun
from tokenspeed.errors import ModelLoadError
from tokenspeed.execution.recorders import CpuRecorder
from tokenspeed.execution.speculation import model_drafter
from tokenspeed.execution.speculation.model_drafter import LEAST_LATER, SLEEPS_AFTER
from tokenspeed.execution.speculation.mtp import mtp_drafter
from tokenspeed.models.build import Ranks, has_mtp, load_model
from tokenspeed.models.causal_lm import CausalLM
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


class Plain:
    """The paper's module over whole sequences, with the decoder layer of transformers.

    Section 2.2 of arXiv:2412.19437: no cache, no pages, no kernels of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.model = reference_model(folder)
        config = self.model.config
        at = f"model.layers.{config.num_hidden_layers}."
        tensors = load_file(folder / "model.safetensors")
        own = {name.removeprefix(at): t for name, t in tensors.items() if at in name}
        self.layer = type(self.model.model.layers[-1])(config, config.num_hidden_layers)
        names = [*self.layer.state_dict()]
        held = {name: own[name] for name in names if name in own}
        if missing := [name for name in names if name not in held]:
            held |= stacked(own, missing)
        self.layer.load_state_dict(held)
        self.w = {name: own[f"{name}.weight"] for name in ("enorm", "hnorm", "eh_proj")}
        self.w["norm"] = own["shared_head.norm.weight"]
        self.eps = config.rms_norm_eps

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.w[name]

    @torch.no_grad()
    def module(self, hidden: Tensor, ids: list[int]) -> Tensor:
        """[T, D] beside the T ids behind them -> [T, D]"""
        embedded = self.model.get_input_embeddings()(torch.tensor(ids))
        pair = [self.norm(embedded, "enorm"), self.norm(hidden, "hnorm")]
        x = linear(torch.cat(pair, -1), self.w["eh_proj"])[None]
        turns = self.model.model.rotary_emb(x, torch.arange(len(ids))[None])
        mask = torch.full((len(ids),) * 2, float("-inf")).triu(1)[None, None]
        y = self.layer(x, attention_mask=mask, position_embeddings=turns)
        y = y[0] if isinstance(y, tuple) else y
        return self.norm(y.view(len(ids), -1), "norm")

    @torch.no_grad()
    def drafts(self, ids: list[int], count: int) -> list[int]:
        """Greedy, behind a sequence whose last id the model has not read yet."""
        hidden = self.model.model(torch.tensor([ids[:-1]])).last_hidden_state[0]
        after, found = ids[1:], list[int]()
        for _ in range(count):
            left = self.module(hidden, after + found)[-1:]
            found.append(int(self.model.lm_head(left).argmax()))
            hidden = torch.cat([hidden, left])
        return found


def stacked(own: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Experts as transformers holds them, where it holds them in one tensor."""

    def all_of(part: str) -> Tensor:
        found = [name for name in own if ".experts." in name and f".{part}." in name]
        return torch.stack([own[f"mlp.experts.{e}.{part}.weight"] for e in range(len(found))])

    both = {
        "mlp.experts.gate_up_proj": lambda: torch.cat([all_of("gate_proj"), all_of("up_proj")], 1),
        "mlp.experts.down_proj": lambda: all_of("down_proj"),
    }
    return {name: both[name]() for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mtp"), "deepseek_v3")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> CausalLM:
    return load_model(folder, dtype, CPU, 192, mtp="with", **options)


def drafting(model: CausalLM, **options: Any) -> Drafting:
    return Drafting(model, mtp_drafter(model, None, 4), **options)


def prompt(length: int, start: int = 0) -> list[int]:
    return [(11 * i + i * i // 5 + start) % 500 for i in range(length)]


def test_a_module_computes_what_plain_torch_does(folder: Path, plain: Plain) -> None:
    model, ids = load(folder), prompt(40)
    run, fed = PagedRun(model), PagedRun(model)
    hidden = model.forward(run.batch({2: ids[:-1]}), run.caches)
    assert model.mtp is not None
    left = model.mtp.forward(hidden, fed.batch({2: ids[1:]}), fed.caches[0])
    expected = plain.module(hidden.float(), ids[1:])
    torch.testing.assert_close(left.float(), expected, rtol=0, atol=1e-4)
    logits = plain.model.lm_head(expected)
    torch.testing.assert_close(model.logits(left).float(), logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 70])
def test_drafts_do_not_depend_on_how_a_prompt_was_read(
    folder: Path, plain: Plain, chunk: int
) -> None:
    steps = drafting(load(folder))
    steps.begin(3, prompt(70))
    while len(steps.ids[3]) == 70:
        assert not steps.drafts[3]
        steps.step({3: chunk}, propose=4)
    assert steps.drafts[3] == plain.drafts(steps.ids[3], 4)


@pytest.mark.parametrize("captured", [False, True])
def test_drafts_of_mixed_rows_are_those_of_each_alone(
    folder: Path, plain: Plain, captured: bool
) -> None:
    """Decodes, verified drafts and chunks together, some without a proposal, a slot bound anew."""
    model = load(folder, torch.float32 if captured else torch.float64)
    steps = drafting(model, recorder=CpuRecorder() if captured else None)
    for slot, length in ((0, 30), (1, 5), (4, 62)):
        steps.begin(slot, prompt(length, slot))
    rows: list[tuple[dict[int, int], int | dict[int, int]]] = [
        ({0: 20, 1: 5}, 4),
        ({0: 20, 1: 9, 4: 40}, {0: 4, 1: 0, 4: 3}),
        ({0: 9, 1: 9, 4: 40}, {0: 1, 1: 0, 4: 3}),
        ({4: 9, 1: 9, 0: 9}, {0: 0, 1: 3, 4: 4}),
        ({0: 9, 4: 9}, {0: 2, 4: 4}),
        ({0: 9, 1: 9, 4: 9}, {0: 0, 1: 4, 4: 1}),
        ({0: 9, 1: 9, 4: 9}, 0),
        ({0: 9, 1: 9, 4: 9}, 2),
        ({0: 9, 1: 9, 4: 9}, 2),
    ]
    for at, (pieces, propose) in enumerate(rows):
        if at == 5:
            steps.begin(4, prompt(8, 77))
        steps.step(pieces, propose)
        for slot in pieces:
            wanted = propose if isinstance(propose, int) else propose.get(slot, 0)
            known = len(steps.ids[slot]) > steps.run.lengths[slot]
            reading = len(steps.ids[slot]) - steps.run.lengths[slot] > 1
            expected = plain.drafts(steps.ids[slot], wanted) if known and not reading else []
            assert steps.drafts[slot] == expected


def test_a_prefix_hit_brings_the_modules_keys(folder: Path, plain: Plain) -> None:
    steps = drafting(load(folder))
    steps.begin(0, prompt(50))
    steps.step({0: 32})
    steps.step({0: 32})
    steps.begin(1, prompt(50), hit=(0, 48))
    steps.step({1: 32}, propose=3)
    assert steps.drafts[1] == plain.drafts(steps.ids[1], 3)


def test_places_wait_and_what_is_too_old_is_a_hole(folder: Path, plain: Plain) -> None:
    """It sleeps after so many steps of which nobody wants drafts, and misses what goes by."""
    steps = drafting(load(folder))
    for waiting, is_whole in ((SLEEPS_AFTER - 1, True), (SLEEPS_AFTER, False)):
        if not is_whole:
            steps.caches[0][0].zero_()
        steps.begin(2, prompt(20))
        steps.step({2: 20})
        for _ in range(waiting):
            steps.step({2: 1})
        steps.step({2: 1}, propose=4)
        assert len(steps.drafts[2]) == 4
        fed = steps.caches[0][0][steps.run.page_table[2].long()].flatten(0, 1)
        holes = [place for place in range(21 + waiting) if not fed[place].any()]
        assert holes == ([] if is_whole else list(range(20, 20 + waiting)))
        if is_whole:
            assert steps.drafts[2] == plain.drafts(steps.ids[2], 4)


@pytest.mark.parametrize("room", [LEAST_LATER, 1])
def test_what_was_verified_waits_too(
    folder: Path, plain: Plain, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of drafts of others, in steps of which nobody wants any, as many as there is room for."""
    monkeypatch.setattr(model_drafter, "LEAST_LATER", room)
    known = drafting(load(folder))
    known.begin(1, prompt(20))
    known.step({1: 20})
    for _ in range(80):
        known.step({1: 1})
    ids = known.ids[1]
    steps = drafting(load(folder))
    steps.caches[0][0].zero_()
    steps.begin(2, prompt(20))
    steps.step({2: 20})
    for step in range(10):
        at = len(steps.ids[2])
        right = ids[at : at + step % 5]
        steps.drafts[2] = [*right, *[(ids[at + len(right)] + 1) % 500] * 15]
        steps.step({2: 1})
        assert len(steps.ids[2]) == at + len(right) + 1
    last = len(steps.ids[2])
    steps.step({2: 1}, propose=4)
    fed = steps.caches[0][0][steps.run.page_table[2].long()].flatten(0, 1)
    holes = [place for place in range(last) if not fed[place].any()]
    assert not holes
    assert steps.drafts[2] == plain.drafts(steps.ids[2], 4)


def test_a_chain_writes_only_to_pages_of_its_sequence_or_its_own(folder: Path) -> None:
    steps = drafting(load(folder))
    steps.begin(1, prompt(16))
    table = steps.run.page_table.clone()
    steps.step({1: 16}, propose=4)
    assert torch.equal(steps.run.page_table, table)
    (cache,) = steps.caches[0]
    written = (~cache[:, :, 0].isnan()).nonzero().tolist()
    own = 64 + 1 * 1  # one page for each slot
    first = int(table[1, 0])
    assert sorted(written) == sorted(
        [*([first, i] for i in range(16)), *([own, i] for i in range(3))]
    )


@pytest.mark.parametrize("split", [False, True])
def test_ranks_draft_what_one_does(folder: Path, plain: Plain, split: bool) -> None:
    def on_rank(communicator: Communicator) -> tuple[list[int], list[int]]:
        ranks = Ranks(
            Mesh(tp=2, ep=2), communicator.rank, communicator, variant=Variant(split=split)
        )
        steps = drafting(load(folder, ranks=ranks))
        steps.begin(1, prompt(37))
        steps.step({1: 20}, propose=3)
        steps.step({1: 20}, propose=3)
        steps.step({1: 20}, propose=3)
        return steps.ids[1], steps.drafts[1]

    for ids, drafts in run_ranks(2, on_rank):
        assert drafts == plain.drafts(ids, 3)


def without(folder: Path, target: Path, tensor: str) -> None:
    """A copy of the checkpoint that lacks a tensor."""
    target.mkdir()
    for name in ("config.json",):
        (target / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named_or_the_module_left_out(folder: Path, tmp_path: Path) -> None:
    lost = "model.layers.3.hnorm.weight"
    without(folder, tmp_path / "part", lost)
    with pytest.raises(ModelLoadError, match=f"lacks 1 tensor.*{lost}"):
        load(tmp_path / "part")
    assert has_mtp(folder)
    assert not has_mtp(tmp_path / "part")
    assert load_model(tmp_path / "part", torch.float32, CPU, 192, mtp="if there").mtp is None
    assert load_model(folder, torch.float32, CPU, 192, mtp="if there").mtp is not None


def test_a_model_without_such_layers_says_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM has no layers that predict further"):
        load(tmp_path)
    assert not has_mtp(tmp_path)


DEMO = Path(tokenspeed.__file__).parent / "assets" / "demo"


def held_out() -> Iterator[list[int]]:
    """Modules of the standard library that the demo model was not trained on."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for module in (copyreg, process):
        yield tokenizer.encode(inspect.getsource(module)).ids[:1500]


def test_the_demo_models_module_drafts_what_the_model_chooses() -> None:
    """68.8% of the time on all held-out files, says the training code (assets/demo/README.md)."""
    model, agreed = load(DEMO, torch.float32), []
    assert model.mtp is not None
    for ids in held_out():
        for at in range(0, len(ids) - 1, 176):
            piece = ids[at : at + 177]
            run, fed = PagedRun(model), PagedRun(model)
            hidden = model.forward(run.batch({0: piece[:-1]}), run.caches)
            chosen = model.logits(hidden).argmax(-1)
            left = model.mtp.forward(hidden, fed.batch({0: piece[1:]}), fed.caches[0])
            agreed.append(model.logits(left).argmax(-1)[:-1] == chosen[1:])
    assert 0.64 < torch.cat(agreed).float().mean() < 0.74
