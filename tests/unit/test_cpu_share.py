# SPDX-License-Identifier: MIT
"""Cores and memory divided among processes of one machine."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tokenspeed.config import CacheOptions
from tokenspeed.execution import kv_cache
from tokenspeed.execution.cpu_share import cores_of, cpu_share
from tokenspeed.layers.cache_spec import CacheSpec

PAIRS = [frozenset({i, i + 8}) for i in range(8)]  # eight cores of two threads


@pytest.mark.parametrize("count", range(1, 9))
def test_shares_are_whole_cores_even_and_apart(count: int) -> None:
    shares = [cpu_share(PAIRS, i, count) for i in range(count)]
    assert sorted(cpu for share in shares for cpu in share) == list(range(16))
    for share in shares:
        assert all(core <= share or not core & share for core in PAIRS)
        assert len(share) // 2 in (8 // count, -(-8 // count))


def test_more_processes_than_cores_share_everything() -> None:
    assert {cpu_share(PAIRS, i, 9) for i in range(9)} == {frozenset(range(16))}


@pytest.mark.parametrize(("index", "count"), [(1, 1), (-1, 2), (0, 0)])
def test_an_impossible_share_is_refused(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="index must be in"):
        cpu_share(PAIRS, index, count)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system binds no process")
def test_a_process_and_its_kernels_keep_to_the_share() -> None:
    mine = cores_of(os.sched_getaffinity(0))
    code = (
        "import os; from tokenspeed.execution.cpu_share import take_cpu_share as take\n"
        f"share = take({len(mine) - 1}, {len(mine)})\n"
        "import torch; from tokenspeed import _cpu\n"
        "assert os.sched_getaffinity(0) == share\n"
        "assert torch.get_num_threads() <= len(share)\n"
        "print(sorted(share), _cpu.num_threads())"
    )
    run = [sys.executable, "-c", code]
    said = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said == f"{sorted(mine[-1])} 1\n"


def test_engines_of_one_machine_divide_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "free_memory", lambda _: 1000 * 64 * 4)  # of 1000 pages
    specs = [CacheSpec(((1,),), torch.float32)]

    def pages(num_sharers: int, **options: int) -> int:
        return kv_cache.choose_num_pages(
            CacheOptions(**options),
            specs,
            max_model_len=1 << 20,
            max_num_seqs=64,
            num_sharers=num_sharers,
        )

    assert [pages(n) for n in (1, 2, 5)] == [300, 150, 60]
    assert pages(2, num_pages=500) == 500
    with pytest.raises(ValueError, match="for each of 2 engines: lower num_pages"):
        pages(2, num_pages=501)
