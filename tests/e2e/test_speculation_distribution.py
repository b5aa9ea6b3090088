# SPDX-License-Identifier: MIT
"""Sampled ids with drafts follow the model's own distribution: chi-square over small vocabularies.

What is expected comes from transformers' logits and a second implementation of temperature, top_k,
min_p and top_p, so nothing of the sampler under test. Observed are the first two ids together and
the third alone, of thousands of seeds; drafts are of a fixed depth, so that most ids come of steps
that verify. Holm's method holds the chance of any false alarm in all tests together at 1%.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import make_checkpoint, make_eagle3, reference_model
from tokenspeed import LLM, SamplingParams

VOCAB, NUM_SEEDS, LEAST_EXPECTED = 24, 6000, 8.0
FALSE_ALARMS = 0.01
PROMPT = [3, 9, 4, 3, 9, 4, 3, 9, 11, 4, 3]  # repeats itself, so that suffixes match
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rope_scaling": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top_k": {"temperature": 1.3, "top_k": 6},
    "top_p": {"temperature": 1.0, "top_p": 0.75},
    "min_p": {"temperature": 1.2, "min_p": 0.3},
}
DRAFTERS = ("ngram", "suffix", "mtp", "eagle3", "draft_model", "suffix+mtp")


def kept(logits: Tensor, setting: dict[str, Any]) -> Tensor:
    """Probabilities [n, V] float64 after the filters, as the documentation words them."""
    probability = (logits.double() / setting["temperature"]).softmax(-1)
    for row in probability:
        order = sorted(range(VOCAB), key=lambda token: (-float(row[token]), token))
        stay = order[: setting.get("top_k") or VOCAB]
        stay = [t for t in stay if row[t] >= setting.get("min_p", 0.0) * row[order[0]]]
        total, mass, most = float(row[stay].sum()), 0.0, setting.get("top_p", 1.0)
        fewest = []
        for token in stay:
            if mass >= most:
                break
            fewest.append(token)
            mass += float(row[token]) / total
        gone = torch.ones(VOCAB, dtype=torch.bool)
        gone[fewest] = False
        row[gone] = 0.0
    return probability / probability.sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("distribution")
    target = make_checkpoint(base / "target", "deepseek_v3", **SHAPE)
    draft = make_checkpoint(base / "draft", "deepseek_v3", seed=5, **SHAPE)
    heard = {"eagle_aux_hidden_state_layer_ids": [1, 2]}
    head = make_eagle3(
        base / "head",
        num_heard=2,
        vocab_size=VOCAB,
        draft_vocab_size=VOCAB // 2,
        eagle_config=heard,
    )
    return {"target": target, "draft_model": draft, "eagle3": head}


def next_logits(model: Any, contexts: Sequence[list[int]]) -> Tensor:
    """float32 [contexts, V]; all contexts are of one length."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor(contexts)).logits[:, -1]
    return logits


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, tuple[Tensor, Tensor]]:
    """By setting: probabilities of the first two ids [V, V], and of the third [V]."""
    model, every = reference_model(folders["target"]), range(VOCAB)
    first = next_logits(model, [PROMPT])
    second = next_logits(model, [[*PROMPT, a] for a in every])
    third = next_logits(model, [[*PROMPT, a, b] for a in every for b in every])
    tables = {}
    for name, setting in SETTINGS.items():
        pair = kept(first, setting).T * kept(second, setting)
        tables[name] = pair, pair.flatten() @ kept(third, setting)
    return tables


def p_value(observed: Tensor, probability: Tensor) -> float:
    """Pearson's test; cells of which too few are expected count as one."""
    expected = probability.flatten() * NUM_SEEDS
    counts = observed.flatten().double()
    assert not counts[expected == 0].any(), "an id came that must never come"
    large = expected >= LEAST_EXPECTED
    rest = expected[~large].sum()
    cells = torch.cat([expected[large], rest[None]]) if rest > 0 else expected[large]
    seen = torch.cat([counts[large], counts[~large].sum()[None]]) if rest > 0 else counts[large]
    statistic = ((seen - cells) ** 2 / cells).sum()
    half = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def sample(llm: LLM, setting: dict[str, Any], first_seed: int) -> Tensor:
    """[NUM_SEEDS, 4] ids."""
    params = [
        SamplingParams(seed=seed, max_tokens=4, ignore_eos=True, **setting)
        for seed in range(first_seed, first_seed + NUM_SEEDS)
    ]
    prompts: list[Any] = [{"prompt_token_ids": PROMPT}] * NUM_SEEDS
    answers = llm.generate(prompts, params, use_tqdm=False)
    return torch.tensor([answer.outputs[0].token_ids for answer in answers])


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_drafter_leaves_the_distribution_as_it_is(
    folders: dict[str, Path],
    expected: dict[str, tuple[Tensor, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: dict[str, float] = {}
    for number, drafter in enumerate(DRAFTERS):
        asked: dict[str, Any] = {"method": drafter, "num_speculative_tokens": 3, "adaptive": False}
        if drafter == "ngram":
            asked |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
        elif "suffix" in drafter:
            asked["suffix_min_match"] = 1
        if drafter in folders:
            asked["model"] = str(folders[drafter])
        with LLM(
            str(folders["target"]),
            speculative_config=json.dumps(asked),
            dtype="float32",
            skip_tokenizer_init=True,
        ) as llm:
            for name, setting in SETTINGS.items():
                ids = sample(llm, setting, number * NUM_SEEDS)  # same seeds, same ids
                pair, third = expected[name]
                pairs = torch.bincount(ids[:, 0] * VOCAB + ids[:, 1], minlength=VOCAB**2)
                found[f"{drafter} {name} ids 1 and 2"] = p_value(pairs, pair)
                thirds = torch.bincount(ids[:, 2], minlength=VOCAB)
                found[f"{drafter} {name} id 3"] = p_value(thirds, third)
            stats = llm._engine.stats().speculation
            assert stats is not None
            drafted = sum(counts.num_draft_tokens for counts in stats.drafters)
            accepted = sum(counts.num_accepted_tokens for counts in stats.drafters)
            assert drafted > NUM_SEEDS
            assert 0 < accepted < drafted
    with capsys.disabled():
        print()
        for case, p in sorted(found.items(), key=lambda item: item[1]):
            print(f"{case:40} p {p:.4f}")
    for rank, p in enumerate(sorted(found.values())):
        assert p > FALSE_ALARMS / (len(found) - rank)


@pytest.mark.full
def test_the_test_sees_a_wrong_distribution(expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    """One that takes another second id every fifth time does not pass."""
    pair, _ = expected["plain"]
    wrong = 0.8 * pair + 0.2 * pair.roll(1, dims=1)
    draw = torch.Generator().manual_seed(0)
    ids = torch.multinomial(wrong.flatten(), NUM_SEEDS, replacement=True, generator=draw)
    assert p_value(torch.bincount(ids, minlength=VOCAB**2), pair) < 1e-4
