# SPDX-License-Identifier: MIT
"""Whatever is drafted, what comes out is what would have come without: every id and every number.

Each way of sampling has a request of its own in one batch, beside chunks of prompts, over models
with grouped-query and with latent attention. What sampling remembers is of the ids kept alone.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.drafted_run import CPU, Answer, DraftedRun, Row, request
from tokenspeed.execution.grammars import VOCABULARY, News, pack_vocabulary, tokenizer_info
from tokenspeed.execution.sampling_params import Grammar
from tokenspeed.models.build import load_model
from tokenspeed.models.causal_lm import CausalLM

pytest.importorskip("xgrammar")
pytestmark = pytest.mark.usefixtures("one_thread")
Answers = list[Answer]

LETTERS = "abcdefghijklmnop"
TOKENS = [*LETTERS, *(a + b for a in LETTERS for b in LETTERS), *(c * 3 for c in LETTERS)]
PACKED = pack_vocabulary(
    [*(token.encode() for token in TOKENS), *(b"" for _ in range(VOCAB_SIZE - len(TOKENS)))],
    [VOCAB_SIZE - 1],
)
END = VOCAB_SIZE - 1
REGEXES = ["([a-h]{1,3}[i-p]){9,99}", "(ab|ba|aab){4}"]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "logprobs": 2},
    {"temperature": 0.7, "top_k": 7, "prompt_logprobs": 1},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.02, "logprobs": 0},
    {"temperature": 0.0, "repetition_penalty": 1.6, "presence_penalty": 0.4},
    {"temperature": 0.6, "frequency_penalty": 1.5, "logprobs": 3},
    {"temperature": 0.0, "logit_bias": {7: 3.0, 90: -2.0}, "min_tokens": 9},
    {"temperature": 0.8, "allowed_token_ids": list(range(4)), "bad_words_token_ids": [[1, 2], [3]]},
    {"temperature": 0.9, "grammar": Grammar(REGEXES[0]), "logprobs": 1},
    {"temperature": 0.0, "grammar": Grammar(REGEXES[0]), "frequency_penalty": 1.0},
    {"temperature": 1.0, "grammar": Grammar(REGEXES[1])},  # ends by itself
]


@pytest.fixture(scope="module")
def news() -> list[News]:
    from tokenspeed.text.grammar_worker import compile_spec

    info = tokenizer_info(PACKED)
    forms = [{"format": {"type": "regex", "pattern": r}, "tokens": {}} for r in REGEXES]
    compiled = [compile_spec(form, info) for form in forms]
    return [(VOCABULARY, PACKED), *zip(REGEXES, compiled, strict=True)]


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, request.param)
    return load_model(folder, torch.float32, CPU, 96)


def run_of(model: CausalLM, news: list[News], **options: Any) -> DraftedRun:
    ids = torch.randint(VOCAB_SIZE, (400,), generator=torch.Generator().manual_seed(5)).tolist()
    requests = []
    for i, way in enumerate(WAYS):
        stops = [END] if "grammar" in way else [0, 1, 2, 3, 7] if "min_tokens" in way else []
        requests.append(request(ids[20 * i : 23 * i + 2], stops, seed=i, max_tokens=16 + i, **way))
    return DraftedRun(model, requests, news=news, **options)


@pytest.fixture(scope="module")
def plain(model: CausalLM, news: list[News]) -> Answers:
    """Without drafts, each step of the model in its own Python."""
    answers = run_of(model, news).run()
    for (ids, entries, prompt), way in zip(answers, WAYS, strict=True):
        assert len(ids) >= 5
        assert len(entries) == (len(ids) if "logprobs" in way else 0)
        assert bool(prompt) == ("prompt_logprobs" in way)
    return answers


class Oracle:
    """Drafts the next ids as they will come, each with some chance another one instead."""

    def __init__(self, answers: Answers, depths: range, wrong: float, seed: int = 0) -> None:
        self.answers, self.depths, self.wrong = answers, depths, wrong
        self.rng = random.Random(seed)
        self.num_drafts = 0

    def __call__(self, row: Row) -> list[int]:
        known = len(row.request.output_ids)
        coming = self.answers[row.number][0][known:]
        depth = self.rng.choice(self.depths)
        filler = [self.rng.randrange(VOCAB_SIZE) for _ in range(depth)]
        drafts = (coming + filler)[:depth]
        drafts = [
            (token + self.rng.randrange(1, VOCAB_SIZE)) % VOCAB_SIZE
            if self.rng.random() < self.wrong
            else token
            for token in drafts
        ]
        self.num_drafts += len(drafts)
        return drafts


def check(got: Answers, expected: Answers) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one == other


@pytest.mark.parametrize("graphs", [False, True])
def test_the_true_continuation_is_kept(
    model: CausalLM, news: list[News], plain: Answers, graphs: bool
) -> None:
    run = run_of(model, news, graphs=graphs)
    check(run.run(Oracle(plain, range(8, 9), wrong=0.0)), plain)
    for row, (ids, _, _) in zip(run.rows, plain, strict=True):
        steps = -(-len(row.request.prompt_ids) // run.chunk) + -(-(len(ids) - 1) // 9)
        assert row.num_steps == steps


@pytest.mark.parametrize("graphs", [False, True])
def test_what_is_always_wrong_costs_no_id(
    model: CausalLM, news: list[News], plain: Answers, graphs: bool
) -> None:
    run = run_of(model, news, graphs=graphs)
    check(run.run(Oracle(plain, range(3, 4), wrong=1.0)), plain)
    for row, (ids, _, _) in zip(run.rows, plain, strict=True):
        assert row.num_steps == -(-len(row.request.prompt_ids) // run.chunk) + len(ids) - 1
    if run.graphs is not None:
        assert run.graphs.num_replays > 3
        assert run.graphs.size_for(1, 2) == 1  # none was found wrong


@pytest.mark.parametrize("seed", range(4))
def test_mixtures_of_all_depths(
    model: CausalLM, news: list[News], plain: Answers, seed: int
) -> None:
    run = run_of(model, news, graphs=seed % 2 == 1, chunk=3 + seed)
    drafts = Oracle(plain, range(9), wrong=0.25, seed=seed)
    check(run.run(drafts, lose=random.Random(seed)), plain)
    assert drafts.num_drafts > 100
    assert run.graphs is None or run.graphs.size_for(1, 2) == 1
