# SPDX-License-Identifier: MIT
"""The benchmark of the engine's decode loop: its floors, and the whole of it on a CPU."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_engine import SHAPE, Case, run, step_bytes  # noqa: E402

KV_BYTES = 27 * 576 * 2


@pytest.mark.parametrize(
    ("batch", "context", "gigabytes"),
    [(1, 1024, 4.93), (1, 51200, 6.49), (8, 51200, 30.6), (32, 51200, 80.8)],
)
def test_floors(batch: int, context: int, gigabytes: float) -> None:
    """Weights, and 1,152 bytes a token and layer: counted by hand elsewhere."""
    found = step_bytes(SHAPE, Case(batch, context, 1), KV_BYTES)
    assert found / 1e9 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.usefixtures("one_thread")
def test_the_loop_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    options = argparse.Namespace(device="cpu", tiny=True, steps=8, output=output)
    assert run(options) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [
        (1, 60),
        (3, 60),
        (1, 130),
        (3, 130),
    ]
    assert all(row["same_ids"] == row["steps"] == 9 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(device="cuda", tiny=True, steps=8, output=None)
    assert run(options) == 2
    assert "lacking: no CUDA device" in capsys.readouterr().out
