# SPDX-License-Identifier: MIT
"""EAGLE-3 heads against plain torch: logits, ranks, loading, drafts. All on tiny models."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from tests.checkpoints import VOCAB_SIZE, make_checkpoint, make_eagle3, reference_model
from tests.drafted_answers import answers
from tests.drafting import Drafting
from tests.paged_run import PagedRun
from tokenspeed.errors import ModelLoadError
from tokenspeed.execution.speculation.eagle3 import eagle3_drafter
from tokenspeed.models.build import Ranks, load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.eagle3 import Eagle3
from tokenspeed.models.eagle3_build import load_eagle3
from tokenspeed.models.eagle3_config import read_eagle3
from tokenspeed.models.hf_config import HfConfig, read_json
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.simulate import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
EPS, ALL = 1e-5, 10_000
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # rope tables are float32
PROMPT = [(11 * i + i * i // 5) % 500 for i in range(70)]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """x [T, heads, 16] turned as its position says, in halves."""
    angles = positions[:, None] / 10000.0 ** (torch.arange(0, 16, 2).double() / 16)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :8], x[..., 8:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class PlainHead:
    """The paper's head over whole sequences, in float64: no cache, no pages, no kernels."""

    def __init__(self, folder: Path, target: Any, *, norm_before_residual: bool = False) -> None:
        self.w = {
            name.removeprefix("midlayer.").removesuffix(".weight"): tensor.double()
            for name, tensor in load_file(folder / "model.safetensors").items()
            if tensor.is_floating_point()
        }
        self.embedding = self.w.get("embed_tokens", target.get_input_embeddings().weight.double())
        self.norm_before_residual = norm_before_residual

    def fuse(self, streams: list[Tensor]) -> Tensor:
        return linear(torch.cat(streams, -1), self.w["fc"])

    def __call__(self, ids: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """ids[p] is the token after position p: (logits, next hidden states) of each position."""
        w, count = self.w, len(ids)
        residual = hidden
        hidden = normed(hidden, w["hidden_norm"])
        if self.norm_before_residual:
            residual = hidden
        x = torch.cat([normed(self.embedding[ids], w["input_layernorm"]), hidden], -1)
        positions = torch.arange(count).double()
        q, k, v = (
            linear(x, w[f"self_attn.{n}_proj"]).view(count, heads, 16)
            for n, heads in (("q", 4), ("k", 2), ("v", 2))
        )
        q, k = turned(q, positions), turned(k, positions)
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / 4
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1))
        hidden = residual + linear(y.flatten(1), w["self_attn.o_proj"])
        x = normed(hidden, w["post_attention_layernorm"])
        gated = silu(linear(x, w["mlp.gate_proj"])) * linear(x, w["mlp.up_proj"])
        hidden = hidden + linear(gated, w["mlp.down_proj"])
        return linear(normed(hidden, w["norm"]), w["lm_head"]), hidden


def streams(target: Any, ids: list[int], layers: tuple[int, ...]) -> list[Tensor]:
    states = target.double()(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [states[layer + 1][0] for layer in layers]


class HeadRun:
    """A target and its head over the same pages; the head's layer has a cache of its own."""

    def __init__(self, target: CausalLM, head: Eagle3) -> None:
        self.run, self.head = PagedRun(target), head
        shapes = head.cache_spec(head.target.dtype).shapes
        self.cache = tuple(
            torch.full((64, 16, *shape), torch.nan, dtype=head.target.dtype) for shape in shapes
        )

    def step(self, ids: list[int], following: list[int]) -> tuple[Tensor, Tensor]:
        """The head's logits and next hidden states at the places of `ids`."""
        target = self.run.model
        target.spmd.begin_step([len(ids)])
        batch = self.run.batch({3: ids})
        target.forward(batch, self.run.caches)
        fused = self.head.fuse(target.aux_hidden)
        self.head.spmd.begin_step([len(ids)])
        hidden = self.head(torch.tensor(following), fused, batch, self.cache)
        return self.head.logits(hidden), hidden


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return make_checkpoint(folder, "qwen3", num_hidden_layers=5)


def load(target: Path, head: Path, ranks: Ranks | None = None) -> HeadRun:
    model = load_model(target, torch.float64, CPU, 192, ranks=ranks)
    return HeadRun(model, load_eagle3(head, model, ranks))


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own embedding": {"embedding": True},
    "normed residual": {"norm_before_residual": True},
    "all tokens": {"draft_vocab_size": VOCAB_SIZE, "drop": ("d2t", "t2d")},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_computes_what_plain_torch_does(target: Path, tmp_path: Path, name: str) -> None:
    changes = HEADS[name]
    folder = make_eagle3(tmp_path, **changes)
    run, reference = load(target, folder), reference_model(target)
    plain = PlainHead(
        folder, reference, norm_before_residual=changes.get("norm_before_residual", False)
    )
    ids = PROMPT
    want, states = plain(ids[1:], plain.fuse(streams(reference, ids[:-1], (1, 2, 3))))
    at = 0
    for end in (40, 41, 66, 69):  # chunks and a lone token; 64 positions were trained
        logits, hidden = run.step(ids[at:end], ids[at + 1 : end + 1])
        close(hidden, states[at:end])
        if "all" in name:
            close(logits, want[at:end])
        else:
            close(logits[:, 1::2], want[at:end])
            assert torch.isneginf(logits[:, ::2]).all()
        at = end


def test_a_head_hears_other_layers_and_another_number_of_them(target: Path, tmp_path: Path) -> None:
    layers = {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": [1, 5]}
    folder = make_eagle3(tmp_path, num_heard=2, **(layers | {"draft_vocab_size": VOCAB_SIZE}))
    with pytest.raises(ModelLoadError, match=r"\[1, 5\] does not name rising layers of 5"):
        load(target, folder)  # ids that begin with 1 are layers
    ids = {"eagle_aux_hidden_state_layer_ids": [2, 4]}  # others count the embedding
    folder = make_eagle3(tmp_path, num_heard=2, **(layers | ids))
    run, reference = load(target, folder), reference_model(target)
    plain = PlainHead(folder, reference)
    want, _ = plain(PROMPT[1:9], plain.fuse(streams(reference, PROMPT[:8], (1, 3))))
    close(run.step(PROMPT[:8], PROMPT[1:9])[0][:, 1::2], want)


@pytest.mark.parametrize("embedding", [False, True])
def test_ranks_compute_what_one_does(target: Path, tmp_path: Path, embedding: bool) -> None:
    folder = make_eagle3(tmp_path, embedding=embedding, norm_before_residual=embedding)
    pieces = [slice(0, 21), slice(21, 22), slice(22, 30)]

    def drive(run: HeadRun) -> list[Tensor]:
        found = [run.step(PROMPT[p], PROMPT[p.start + 1 : p.stop + 1]) for p in pieces]
        return [torch.cat(each) for each in zip(*found, strict=True)]

    def on_rank(communicator: Communicator) -> list[Tensor]:
        return drive(load(target, folder, Ranks(Mesh(tp=2), communicator.rank, communicator)))

    expected = drive(load(target, folder))
    for mine in run_ranks(2, on_rank):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


def test_a_shared_embedding_is_held_once(target: Path, tmp_path: Path) -> None:
    run = load(target, make_eagle3(tmp_path))
    assert run.head.body.embed_tokens.weight is run.run.model.model.embed_tokens.weight
    assert all("embed_tokens" not in name for name, _ in run.head.named_parameters())


WRONG_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"architectures": ["LlamaForCausalLM"]}, "architectures: LlamaForCausalLM is"),
    "unknown key": ({"norm_before_fc": True}, "norm_before_fc: True: this key of an EAGLE-3 head"),
    "newer heads": ({"fc_norm": True}, "fc_norm: True: this key"),
    "unknown inner key": (
        {"eagle_config": {"use_last": 3}},
        "eagle_config: use_last: 3: this key of an EAGLE-3 head",
    ),
    "no hidden states": (
        {"eagle_config": {"use_aux_hidden_state": False}},
        "use_aux_hidden_state: EAGLE-3 reads hidden states",
    ),
    "default layers": (
        {"eagle_config": None},
        r"layer_ids: not given, and the default \[2, 2, 2\] does not name rising layers of 5",
    ),
    "falling layers": (
        {"eagle_aux_hidden_state_layer_ids": [3, 2, 1], "eagle_config": ...},
        r"\[3, 2, 1\] does not name rising layers of 5",
    ),
    "vocabulary": ({"vocab_size": 500}, "vocab_size: 500 tokens, and the target has 512"),
    "more drafts than tokens": ({"draft_vocab_size": 513}, "draft_vocab_size: must be in"),
    "width": ({"hidden_size": 96}, "hidden_size: 96, and the target has 64"),
    "target's width": ({"target_hidden_size": 32}, "target_hidden_size: 32, and the target has 64"),
    "layers": ({"num_hidden_layers": 2}, "num_hidden_layers: an EAGLE-3 head has one layer"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings: an EAGLE-3 head has an lm_head"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_a_wrong_configuration_is_refused(target: Path, tmp_path: Path, name: str) -> None:
    changes, message = WRONG_KEYS[name]
    make_eagle3(tmp_path)
    values = read_json(tmp_path / "config.json") | changes
    values = {key: value for key, value in values.items() if value is not ...}
    decoder = load_model(target, torch.float32, CPU, 192).config
    with pytest.raises(ModelLoadError, match=message):
        read_eagle3(HfConfig(values), decoder)


def test_a_key_that_is_off_is_harmless(target: Path, tmp_path: Path) -> None:
    load(target, make_eagle3(tmp_path, norm_before_fc=False, fc_norm=None, sliding_window=None))


WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("midlayer.hidden_norm.weight"), "lacks 1 .*midlayer.hidden_norm"),
    "no head": (lambda t: t.pop("lm_head.weight"), "lacks 1 tensor.*lm_head.weight"),
    "no table": (lambda t: t.pop("d2t"), "lacks d2t, which says what the 256 tokens"),
    "unknown": (
        lambda t: t.update({"midlayer.bonus.weight": torch.ones(1)}),
        "has no place for 1 tensor.*midlayer.bonus",
    ),
    "fc of another width": (
        lambda t: t.update({"fc.weight": torch.ones(64, 128)}),
        r"fc.weight: shape \(64, 128\) where config.json needs \(64, 192\)",
    ),
    "table of another length": (
        lambda t: t.update(d2t=torch.zeros(3).long()),
        r"d2t: I64 of shape \(3,\), must be I64 of shape \(256,\)",
    ),
    "table of fractions": (lambda t: t.update(d2t=torch.zeros(256)), "d2t: F32 of shape"),
    "table that leads out": (
        lambda t: t.update(d2t=torch.full((256,), 300)),
        "d2t: does not lead to 256 different ids below 512",
    ),
    "table that is not one to one": (
        lambda t: t.update(d2t=-torch.arange(256)),
        "d2t: does not lead to 256 different ids",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_refused(target: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG_TENSORS[name]
    make_eagle3(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        load(target, tmp_path)


def test_stages_and_groups_are_refused(target: Path, tmp_path: Path) -> None:
    model = load_model(target, torch.float32, CPU, 192)
    for mesh in (Mesh(dp=2), Mesh(pp=2)):
        with pytest.raises(ValueError, match="drafters with weights run with dp 1 and pp 1"):
            load_eagle3(make_eagle3(tmp_path), model, Ranks(mesh))
    with pytest.raises(ValueError, match="divided over all 4 of them, not over 2"):
        load_eagle3(make_eagle3(tmp_path), model, Ranks(Mesh(tp=2, ep=4)))


def plain_drafts(
    plain: PlainHead, reference: Any, run: Drafting, slot: int, count: int, ids: list[int]
) -> list[int]:
    """The chain over whole sequences: what the head gives is beside its draft in the next round."""
    hidden = plain.fuse(streams(reference, ids[:-1], (1, 2, 3)))
    fed = ids[1:]
    for _ in range(count):
        logits, states = plain(fed, hidden)
        spread = torch.full((1, VOCAB_SIZE), -torch.inf).index_copy_(
            1, torch.arange(256) * 2 + 1, logits[-1:].float()
        )
        place = torch.tensor([len(fed) + 1])
        fed = [*fed, int(run.sample(spread, np.array([slot], np.int32), place))]
        hidden = torch.cat([hidden, states[-1:]])
    return fed[len(ids) - 1 :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_are_those_of_plain_torch(target: Path, tmp_path: Path, temperature: float) -> None:
    """Chunks, mixed rows, drafts of others that are right in part, a prefix hit, a retraction."""
    folder, reference = make_eagle3(tmp_path), reference_model(target)
    plain, model = PlainHead(folder, reference), load_model(target, torch.float64, CPU, 192)
    drafter = eagle3_drafter(load_eagle3(folder, model), None, max_depth=4)
    warm = dict.fromkeys(range(5), temperature)
    oracle = Drafting(model, drafter, warm)
    prompts = {0: PROMPT[:50], 2: PROMPT[5:42]}
    for slot, prompt in prompts.items():
        oracle.begin(slot, prompt)
    for _ in range(20):
        oracle.step({0: ALL, 2: ALL})
    run = Drafting(model, drafter, warm)

    def check(depths: dict[int, int], chunks: dict[int, int] | None = None) -> None:
        before = {slot: len(run.ids[slot]) for slot in depths}
        run.step({slot: (chunks or {}).get(slot, ALL) for slot in depths}, depths)
        for slot, depth in depths.items():
            ids = run.ids[slot]
            count = min(depth, 4) if len(ids) > before[slot] else 0
            want = plain_drafts(plain, reference, run, slot, count, ids)
            assert run.drafts[slot] == want
            if slot in prompts:  # what is verified next is right in part
                true = oracle.ids[slot][len(ids) :][: len(ids) % 4]
                run.drafts[slot] = [*true, 3] if len(ids) % 3 else true

    for slot, prompt in prompts.items():
        run.begin(slot, prompt)
    check({0: 3}, {0: 17})
    check({0: 3, 2: 3}, {0: 20})
    check({0: 2, 2: 9})
    check({0: 0, 2: 3})
    run.begin(4, PROMPT[:36], hit=(0, 32))
    check({2: 0, 0: 0, 4: 3})
    check({0: 4, 4: 0, 2: 0})
    run.begin(2, run.ids[2])  # it was retracted
    check({2: 3, 4: 3})
    check({0: 3, 2: 3, 4: 4})
    assert run.accepted > 5
    for slot in prompts:
        assert run.ids[slot] == oracle.ids[slot][: len(run.ids[slot])]


def test_an_engine_with_a_head_gives_the_same_answers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "target", "qwen3", tokenizer=True, num_hidden_layers=5)
    head = make_eagle3(tmp_path / "head")
    config = {"model": str(head), "num_speculative_tokens": 3, "adaptive": False}
    found, stats = answers(folder, method="eagle3", **config)
    assert found == answers(folder, method="off")[0]
    assert stats.speculation is not None
    drafts = stats.speculation.drafters[0]
    assert drafts.num_draft_tokens > 500
    assert drafts.num_accepted_tokens > 10  # of random weights, by the noise they share
