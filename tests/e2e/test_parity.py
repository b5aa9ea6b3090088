# SPDX-License-Identifier: MIT
"""The whole engine against transformers, in fp32 on tiny random checkpoints of five families.

Greedy tokens are compared by teacher forcing: transformers reads prompt and answer in one pass, and
its likeliest token at each position must be the one that the engine gave. That is equality of
greedy decoding, by induction over the positions.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint, reference_model
from tokenspeed.config import EngineConfig
from tokenspeed.engine.build import assemble
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import GenerateRequest, TokenOutput
from tokenspeed.engine.part import assemble_part
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.models.build import load_model

NUM_PROMPTS, NUM_TOKENS = 32, 64
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
BASE: dict[str, Any] = {
    "page_size": 16,
    "num_pages": 512,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 256,
    "max_model_len": 128,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "chunk 7, batch 7": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "chunk 64, batch 8, overlap": {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "overlap_depth": 1,
    },
    "batch 1, no prefix cache": {"max_num_seqs": 1, "enable_prefix_caching": False},
    "page 64, overlap": {"page_size": 64, "num_pages": 128, "overlap_depth": 1},
    "retraction": {"num_pages": 14, "max_num_seqs": 8},
    "retraction, overlap, chunk 64": {
        "num_pages": 14,
        "max_num_seqs": 8,
        "overlap_depth": 1,
        "max_num_batched_tokens": 64,
    },
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_model(checkpoint, torch.float32, CPU, 128)


def prompts() -> list[list[int]]:
    """32 prompts of 1 to 40 ids; half of them start alike."""
    dice = random.Random(4)
    shared = [dice.randrange(VOCAB_SIZE) for _ in range(34)]
    made = []
    for i in range(NUM_PROMPTS):
        length = dice.randint(1, 40)
        own = [dice.randrange(VOCAB_SIZE) for _ in range(length)]
        made.append(shared + own[:6] if i % 2 else own)
    return made


def run(engine: Engine, requests: list[GenerateRequest]) -> dict[int, list[TokenOutput]]:
    for request in requests:
        engine.add_request(request)
    outputs: dict[int, list[TokenOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine._schedulers.check_invariants()
    engine.close()
    return outputs


def engine_around(model: Any, config: EngineConfig) -> Engine:
    return assemble(config, assemble_part(config, model))


def greedy(model: Any, some: list[list[int]], **options: Any) -> tuple[list[list[int]], Engine]:
    engine = engine_around(model, EngineConfig.of(**(BASE | options)))
    outputs = run(engine, [GenerateRequest(i, ids, GREEDY) for i, ids in enumerate(some)])
    return [[t for o in outputs[i] for t in o.token_ids] for i in range(len(some))], engine


@pytest.fixture(scope="module")
def answers(model: Any) -> list[list[int]]:
    return greedy(model, prompts())[0]


def test_64_greedy_tokens_of_32_prompts(checkpoint: Path, answers: list[list[int]]) -> None:
    reference = reference_model(checkpoint)
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert len(answer) == NUM_TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert len({tuple(answer) for answer in answers}) > NUM_PROMPTS // 2


def test_log_probabilities_within_1e_4(checkpoint: Path, model: Any) -> None:
    config = EngineConfig.of(**(BASE | {"max_logprobs": VOCAB_SIZE}))
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=VOCAB_SIZE, prompt_logprobs=0)
    some = prompts()[:4]
    engine = engine_around(model, config)
    outputs = run(engine, [GenerateRequest(i, ids, params) for i, ids in enumerate(some)])
    reference = reference_model(checkpoint)
    for i, prompt in enumerate(some):
        answer = [t for o in outputs[i] for t in o.token_ids]
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        read = outputs[i][0].prompt_logprobs or []
        for position, entry in enumerate(read[1:]):
            assert entry is not None
            assert entry.logprobs[0] == pytest.approx(
                float(expected[position, prompt[position + 1]]), abs=1e-4
            )
        entries = [entry for output in outputs[i] for entry in output.logprobs or []]
        assert len(entries) == len(answer)
        for step, entry in enumerate(entries):
            mine = torch.empty(VOCAB_SIZE)
            mine[entry.token_ids] = torch.tensor(entry.logprobs)
            assert (mine - expected[len(prompt) - 1 + step]).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_schedule_changes_no_token(model: Any, answers: list[list[int]], variant: str) -> None:
    found, engine = greedy(model, prompts(), **VARIANTS[variant])
    assert found == answers
    if "retraction" in variant:
        assert engine.stats().num_preemptions > 0


def test_seeded_tokens_do_not_depend_on_the_batch(model: Any) -> None:
    def sampled(**options: Any) -> list[list[int]]:
        engine = engine_around(model, EngineConfig.of(**(BASE | options)))
        requests = [
            GenerateRequest(
                i, ids, SamplingParams(max_tokens=16, seed=i, top_p=0.9, presence_penalty=0.5)
            )
            for i, ids in enumerate(prompts()[:12])
        ]
        outputs = run(engine, requests)
        return [[t for o in outputs[i] for t in o.token_ids] for i in range(len(requests))]

    together = sampled()
    assert sampled(max_num_seqs=1) == together
    assert sampled(max_num_batched_tokens=7, max_num_seqs=7, overlap_depth=1) == together


@pytest.mark.parametrize("depth", [0, 1])
def test_nan_in_one_of_32_rows_fails_that_request_alone(
    checkpoint: Path, answers: list[list[int]], depth: int
) -> None:
    asked = prompts()
    broken = next(t for t in range(VOCAB_SIZE) if not any(t in p for p in asked + answers))
    model = load_model(checkpoint, torch.float32, CPU, 128)
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = float("nan")
    asked[17] = [*asked[17], broken]
    engine = engine_around(model, EngineConfig.of(**(BASE | {"overlap_depth": depth})))
    outputs = run(engine, [GenerateRequest(i, ids, GREEDY) for i, ids in enumerate(asked)])
    assert (outputs[17][-1].finish_reason, outputs[17][-1].token_ids) == ("error", [])
    for i in set(range(NUM_PROMPTS)) - {17}:
        assert [t for o in outputs[i] for t in o.token_ids] == answers[i]
