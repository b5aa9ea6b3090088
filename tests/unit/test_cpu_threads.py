# SPDX-License-Identifier: MIT
"""`cpu_threads`: the kernels of a CPU have as many, or it is refused."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tokenspeed import _cpu
from tokenspeed.config import EngineConfig
from tokenspeed.engine import part
from tokenspeed.engine.part import build_part


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    before = _cpu.num_threads()
    yield
    _cpu.set_num_threads(before)


def asked(count: int) -> EngineConfig:
    return EngineConfig.of(num_pages=64, max_num_seqs=2, cpu_threads=count)


def test_the_kernels_have_so_many(tmp_path: Path) -> None:
    _cpu.set_num_threads(3)
    build_part(asked(1), make_checkpoint(tmp_path, "qwen3"))
    assert _cpu.num_threads() == 1


def test_more_than_there_are_cores_are_refused(tmp_path: Path) -> None:
    most = os.cpu_count() or 1
    with pytest.raises(ValueError, match=f"cpu_threads: {most + 1} on a machine of {most} cores"):
        build_part(asked(most + 1), make_checkpoint(tmp_path, "qwen3"))


def test_none_are_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        type = "cuda"

    monkeypatch.setattr(part, "device_of", lambda config: Gpu())
    with pytest.raises(ValueError, match="cpu_threads: 1, but the kernels run on cuda"):
        build_part(asked(1), make_checkpoint(tmp_path, "qwen3"))
