# SPDX-License-Identifier: MIT
"""Answers of an engine that cuts prompts into chunks and has too few pages for all its requests."""

from pathlib import Path
from typing import Any

from tokenspeed import LLM, SamplingParams
from tokenspeed.engine.messages import EngineStats

PROMPTS = [[(a * i + i * i // 7) % 250 for i in range(40 + a)] for a in range(1, 6)]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_pages": 14,
    "page_size": 16,
}


def answers(folder: Path, **speculative_config: Any) -> tuple[list[list[int]], EngineStats]:
    """Greedy and sampled ids, and what the engine counted."""
    with LLM(model=str(folder), speculative_config=speculative_config, **OPTIONS) as llm:
        found = []
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_tokens=40, temperature=temperature, seed=7, ignore_eos=True)
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            found += [list(output.outputs[0].token_ids) for output in outputs]
        stats = llm._engine.stats()
    assert stats.num_preemptions > 0
    return found, stats
