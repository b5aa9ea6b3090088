# SPDX-License-Identifier: MIT
"""Whole tiny models on Triton's kernels alone, against the references: prefill, extend, decode."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.paged_run import PagedRun
from tokenspeed.kernels import force_backend
from tokenspeed.models.build import load_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of these tests: CPU's")
# Kernels take rope parts of at least 16 features; two layers: a dense one and one of experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "deepseek_v3": {"qk_rope_head_dim": 16, "n_routed_experts": 8},
}


def logits(folder: Path, backend: str, dtype: torch.dtype) -> Tensor:
    with force_backend(backend):
        run = PagedRun(load_model(folder, dtype, torch.device("cpu"), 192))
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randint(VOCAB_SIZE, (2, 30), generator=generator).tolist()
    steps = ({4: first[:7], 1: second[:1]}, {1: second[1:4], 4: first[7:8]}, {4: first[8:9]})
    return torch.cat([run.step(step) for step in steps])


def compare(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    expected = logits(folder, "reference", dtype)
    actual = logits(folder, "triton", dtype)
    assert float(expected.abs().max()) > 1.0
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_references(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, num_hidden_layers=2, **FAMILIES[family])
    compare(folder, torch.float32, 1e-4)


@pytest.mark.full
def test_logits_in_bfloat16(tmp_path: Path) -> None:
    """Of a dense model: experts that are nearly equal may change places."""
    compare(make_checkpoint(tmp_path, "qwen3", num_hidden_layers=2), torch.bfloat16, 0.1)
