# SPDX-License-Identifier: MIT
"""Experts that move between the processes of a serving engine: no token changes, none is lost."""

from typing import Any

import pytest

from tokenspeed import LLM, SamplingParams

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "num_pages": 40,
    "page_size": 16,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "skip_tokenizer_init": True,
    "speculative_config": '{"method": "suffix", "adaptive": false}',  # as many steps each time
}
EAGER: dict[str, Any] = {
    "enable_eplb": True,
    "num_redundant_experts": 2,
    "eplb_window_steps": 8,
    "eplb_step_interval": 8,
}


def prompts() -> list[list[int]]:
    """Sixteen of 10 to 70 tokens, each from a few ids only, so that experts are loaded unevenly."""
    return [[20 + 97 * i + j % (2 + i % 3) for j in range(10 + 4 * i)] for i in range(16)]


def params() -> list[SamplingParams]:
    """Half greedy, half drawn; lengths differ, so that the batch changes."""
    return [
        SamplingParams(
            temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=40 + 5 * i, ignore_eos=True
        )
        for i in range(16)
    ]


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(prompts(), params(), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "mesh",
    [
        {"expert_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_parallel_size": 2, "overlap_depth": 1},
        pytest.param(
            {"attention_data_parallel_size": 2, "expert_parallel_size": 2, "num_pages": 24},
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"pipeline_parallel_size": 2, "expert_parallel_size": 2}, marks=pytest.mark.full
        ),
    ],
    ids=str,
)
def test_tokens_stay_the_same_while_experts_move_under_load(mesh: dict[str, Any]) -> None:
    """The cache is too small for all sixteen at once, so some are retracted meanwhile."""
    want = answers(LLM("demo", **OPTIONS))
    llm = LLM("demo", **(OPTIONS | EAGER | mesh))
    assert answers(llm) == want
    stats = llm._engine.stats()
    assert stats.num_preemptions > 0
    assert stats.expert_load_rebalances >= 3
    assert stats.expert_load_slots_moved >= 6
    assert stats.expert_load_worst >= 1.0
    llm._engine.close()
