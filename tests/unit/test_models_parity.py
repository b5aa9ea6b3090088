# SPDX-License-Identifier: MIT
"""Every model family against transformers on tiny random weights, through shuffled pages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint, reference_model
from tests.paged_run import PagedRun
from tokenspeed.kernels import force_backend
from tokenspeed.models.build import load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.hub import DEMO_FOLDER

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4


def expected_logits(reference: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0]


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()


def check_family(folder: Path) -> None:
    """With the kernels chosen for this machine, and with the references."""
    reference = reference_model(folder)
    check(load_model(folder, torch.float32, torch.device("cpu"), 192), reference)
    with force_backend("reference"):
        check(load_model(folder, torch.float32, torch.device("cpu"), 192), reference)


def check(model: CausalLM, reference: Any) -> None:
    run = PagedRun(model)
    sequences = {4: random_ids(37, 1), 1: random_ids(150, 2), 2: random_ids(1, 3)}
    want = {slot: expected_logits(reference, ids) for slot, ids in sequences.items()}
    # A ragged prefill, then a mixed batch: a chunk, one-token decodes, and a row that sits out.
    steps = [
        {4: slice(0, 20), 1: slice(0, 70), 2: slice(0, 1)},
        {1: slice(70, 140), 4: slice(20, 21)},
        *({4: slice(21 + i, 22 + i), 1: slice(140 + i, 141 + i)} for i in range(10)),
        {4: slice(31, 37)},
    ]
    for step in steps:
        logits = run.step({slot: sequences[slot][part] for slot, part in step.items()})
        expected = torch.cat([want[slot][part] for slot, part in step.items()])
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    check_family(make_checkpoint(tmp_path, family))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2, grouped, q-LoRA, biases": (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 24,
            "routed_scaling_factor": 2.0,
            "attention_bias": True,
            "mlp_bias": False,
        },
    ),
    "v3, one group, rope in halves, tied": (
        "deepseek_v3",
        {
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "rope_scaling": None,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2, tied, every head its own keys": (
        "qwen2",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 1000000.0},
    ),
    "qwen3, tied, yarn, biases": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen3 moe, every second layer sparse": (
        "qwen3_moe",
        {"mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": False},
    ),
    "minimax, every head its own keys, a quarter of each head turns": (
        "minimax_m2",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "llama, linear rope, one head group": (
        "llama",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "num_key_value_heads": 1,
            "attention_bias": False,
            "mlp_bias": False,
            "head_dim": 24,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_transformers(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    check_family(make_checkpoint(tmp_path, family, **changes))


def test_the_bundled_model_equals_transformers() -> None:
    check_family(DEMO_FOLDER)
