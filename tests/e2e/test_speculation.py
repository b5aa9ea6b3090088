# SPDX-License-Identifier: MIT
"""The demo model with and without drafts: the same answers, whatever is asked and however."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tokenspeed import LLM, SamplingParams
from tokenspeed.llm import CompletionOutput, RequestOutput

pytest.importorskip("xgrammar")

# Prompts come in pieces, and the pages are too few for all requests at once.
TIGHT: dict[str, Any] = {
    "page_size": 16,
    "num_pages": 18,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 40,
    "max_model_len": 240,
}
OFF = {"method": "off"}
FIXED: dict[str, Any] = {"adaptive": False, "num_speculative_tokens": 5}
LOOP = "for i in range(10):\n    print(i)\n"
TEXTS = [
    LOOP * 3 + "for j in range(10):\n    print(",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(",
    "import os\nimport sys\n\n\nclass Shape:\n    def __init__(self, x, y):\n        self.x = x\n",
    "numbers = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, ",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=40)
ASKED: dict[str, SamplingParams] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "narrow": SAMPLED.replace(top_k=20, min_p=0.05, seed=4),
    "punished": SAMPLED.replace(frequency_penalty=0.7, repetition_penalty=1.2, min_tokens=20),
    "biased": GREEDY.replace(logit_bias={198: 2.0}, presence_penalty=0.5),
    "logprobs": GREEDY.replace(logprobs=3, prompt_logprobs=1),
    "sampled logprobs": SAMPLED.replace(logprobs=0, seed=9),
    "several": SAMPLED.replace(n=2, seed=7),
    "stopped": GREEDY.replace(stop=["\n    ", "("]),
    "in json": SAMPLED.replace(
        max_tokens=60,
        structured_outputs={
            "json": {"type": "array", "items": {"enum": ["add", "sub"]}, "minItems": 4}
        },
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, **FIXED},
    "suffix": {"method": "suffix", "suffix_min_match": 1, **FIXED},
    "mtp": {"method": "mtp", **FIXED},
    "both": {"method": "suffix+mtp", **FIXED},
    "auto": {"method": "auto"},
}


def ask(llm: LLM) -> list[RequestOutput]:
    """Everything at once, then all of it again with a prefix that is cached by now."""
    prompts = [text for text in TEXTS[:2] for _ in ASKED]
    params = list(ASKED.values()) * 2
    longer = [text + LOOP for text in prompts]
    return [
        *llm.generate(prompts, params, use_tqdm=False),
        *llm.generate(longer, params, use_tqdm=False),
    ]


def essence(output: CompletionOutput) -> tuple[Any, ...]:
    logprobs = None
    if output.logprobs is not None:
        logprobs = [
            [(token, entry.rank) for token, entry in position.items()]
            for position in output.logprobs
        ]
    ends = (output.finish_reason, output.stop_reason)
    return (output.token_ids, output.text, *ends, logprobs)


def check(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for number, (one, other) in enumerate(zip(outputs, expected, strict=True)):
        asked = list(ASKED)[number % len(ASKED)]
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert essence(a) == essence(b), (number, asked)
            if b.cumulative_logprob is not None:
                assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, rel=1e-5)
        if other.prompt_logprobs is not None:
            assert one.prompt_logprobs is not None
            assert len(one.prompt_logprobs) == len(other.prompt_logprobs)


def check_idle(llm: LLM) -> None:
    engine = llm._engine
    engine._schedulers.check_invariants()
    assert engine.stats().kv_cache_usage == 0
    assert engine._speculator is None or not engine._speculator._live


@pytest.fixture(scope="module")
def expected() -> Iterator[list[RequestOutput]]:
    """Without drafts, and with room for everything."""
    with LLM(speculative_config=OFF, max_model_len=240) as llm:
        yield ask(llm)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("ngram", 0),
        pytest.param("suffix", 0, marks=pytest.mark.full),
        pytest.param("mtp", 0, marks=pytest.mark.full),
        pytest.param("both", 0, marks=pytest.mark.full),
        ("both", 1),
        ("auto", 0),
        pytest.param("auto", 1, marks=pytest.mark.full),
    ],
)
def test_drafts_change_no_answer(expected: list[RequestOutput], name: str, depth: int) -> None:
    with LLM(speculative_config=METHODS[name], overlap_depth=depth, **TIGHT) as llm:
        check(ask(llm), expected)
        check_idle(llm)
        stats = llm._engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_hits > 0
        assert stats.speculation is not None
        drafters = {drafter.name: drafter for drafter in stats.speculation.drafters}
        wanted = {"both": ["suffix", "mtp"], "auto": ["suffix", "mtp"]}.get(name, [name])
        assert list(drafters) == wanted
        for drafter in drafters.values():
            assert drafter.num_draft_tokens > drafter.num_accepted_tokens > 0
            assert drafter.num_accepted_tokens == sum(drafter.accepted_per_pos)


def test_drafts_save_steps() -> None:
    with LLM(speculative_config=OFF) as plain, LLM(speculative_config=METHODS["both"]) as drafts:
        for llm in (plain, drafts):
            llm.generate(TEXTS[0], GREEDY, use_tqdm=False)
        assert drafts._engine.num_steps < 0.7 * plain._engine.num_steps


def test_a_draft_model_that_is_the_model_is_always_right() -> None:
    config = {"method": "draft_model", "model": "demo", **FIXED}
    with LLM(speculative_config=config) as llm:
        asked = [GREEDY, SAMPLED.replace(ignore_eos=True)]
        llm.generate(TEXTS[1:3], asked, use_tqdm=False)
        speculation = llm._engine.stats().speculation
    assert speculation is not None
    (drafter,) = speculation.drafters
    assert drafter.num_draft_tokens == drafter.num_accepted_tokens > 50


def test_what_cannot_be_served_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    plain = {"model": str(make_checkpoint(tmp_path, "llama")), "skip_tokenizer_init": True}
    long = {"method": "ngram", "num_speculative_tokens": 64}
    for config, options, message in (
        ({"method": "draft_model", "model": str(folder)}, {}, "258 tokens, and the target has"),
        ({"method": "mtp"}, plain, "has no layers that predict further tokens"),
        (long, {"num_pages": 4, "page_size": 16}, "64 must be below max_model_len"),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(speculative_config=config, **options)


def random_asks(count: int, seed: int) -> tuple[list[str], list[SamplingParams]]:
    dice = random.Random(seed)
    params = [
        dice.choice([GREEDY, SAMPLED]).replace(max_tokens=dice.randrange(1, 48), seed=number)
        for number in range(count)
    ]
    return [dice.choice(TEXTS)[: dice.randrange(8, 200)] for _ in range(count)], params


Answers = tuple[list[str], list[SamplingParams], list[list[int]]]


@pytest.fixture(scope="module")
def ten_thousand() -> Answers:
    """Prompts, how they are answered, and the ids without drafts."""
    prompts, params = random_asks(10_000, seed=1)
    with LLM(speculative_config=OFF, max_model_len=240) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return prompts, params, [output.outputs[0].token_ids for output in outputs]


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", METHODS)
def test_ten_thousand_answers(name: str, ten_thousand: Answers) -> None:
    """A quarter of a million tokens, over drafts of 1 to 8 tokens."""
    prompts, params, expected = ten_thousand
    share = len(prompts) // 8
    for depth in range(1, 9):
        config = METHODS[name] | {"num_speculative_tokens": depth}
        part = slice((depth - 1) * share, depth * share)
        with LLM(speculative_config=config, **(TIGHT | {"num_pages": 60})) as llm:
            outputs = llm.generate(prompts[part], params[part], use_tqdm=False)
            check_idle(llm)
        found = [o.outputs[0].token_ids for o in outputs]
        for a, b in itertools.zip_longest(found, expected[part]):
            assert a == b, (depth, prompts[part], params[part])
