# SPDX-License-Identifier: MIT
"""Servers of several ranks: the streams of one rank under load, and starts that cannot succeed."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.engine_peer import Peer
from tests.gateway.processes import TEXT, Server, server
from tests.rank_processes import assert_gone, workers_of
from tokenspeed import LLM
from tokenspeed.engine import messages as m
from tokenspeed.engine.ranks.connection import Connection
from tokenspeed.errors import ModelLoadError, RankDiedError

FLAGS = ("--dtype", "float32", "--num-pages", "32", "--page-size", "16", "--max-num-seqs", "16")
NUM_STREAMS = 16


async def stream(client: httpx.AsyncClient, url: str, i: int) -> tuple[str, str]:
    """The text and the reason of one answer, read piece by piece."""
    body = {
        "prompt": f"def function_{i}(first, second):\n" * (1 + i % 4),
        "max_tokens": 24 + 2 * i,
        "temperature": 0.0 if i % 2 else 0.7,
        "seed": i,
        "ignore_eos": True,
        "stream": True,
        "frequency_penalty": 0.2 * (i % 3),
    }
    text, reason = "", ""
    async with client.stream("POST", url + TEXT, json=body) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    return text, reason


def answers_of(made: Server) -> list[tuple[str, str]]:
    async def all_at_once() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(timeout=120.0) as client:
            return await asyncio.gather(*(stream(client, made.url, i) for i in range(NUM_STREAMS)))

    found = asyncio.run(all_at_once())
    assert made.gauge("vllm:num_preemptions_total") > 0
    assert made.gauge("vllm:kv_cache_usage_perc") == 0
    return found


@pytest.fixture(scope="module")
def alone() -> list[tuple[str, str]]:
    with server(*FLAGS, real=True) as made:
        return answers_of(made)


@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-parallel-size", "2"),
        pytest.param(
            ("--attention-data-parallel-size", "2", "--expert-parallel-size", "2"),
            marks=pytest.mark.full,
        ),
        pytest.param(("--pipeline-parallel-size", "2"), marks=pytest.mark.full),
        pytest.param(
            ("--tensor-parallel-size", "2", "--overlap-depth", "1"), marks=pytest.mark.full
        ),
    ],
)
def test_streams_of_one_rank(flags: tuple[str, ...], alone: list[tuple[str, str]]) -> None:
    num_pages = ("--num-pages", "16") if "--attention-data-parallel-size" in flags else ()
    with server(*FLAGS, *flags, *num_pages, real=True) as made:
        process = made.engine()
        workers = workers_of(process.pid)
        assert workers
        assert answers_of(made) == alone
        made.process.terminate()
        assert made.process.wait(10.0) == 0
        assert made.process.stderr is not None
        assert made.process.stderr.read() == b""
        assert_gone([process, *workers], process.pid)


def test_a_mesh_that_does_not_divide_is_one_clear_line() -> None:
    command = [sys.executable, "-m", "tokenspeed", "serve", "--port", "0"]
    command += ["--tensor-parallel-size", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "3" in done.stderr
    assert "Traceback" not in done.stderr
    assert "nanobind" not in done.stderr
    assert "rank 1" not in done.stderr


# A folder as a start finds it, and one that another rank cannot read.


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The demo model without its weights."""
    source = ROOT / "tokenspeed" / "assets" / "demo"
    folder = tmp_path / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_what_rank_0_finds_wrong_itself_is_its_own_error(broken: Path) -> None:
    with pytest.raises(ModelLoadError, match="safetensors"):
        LLM(str(broken), tensor_parallel_size=2, num_pages=16)


LIMITED = {"dtype": "float32", "tensor_parallel_size": 2, "num_pages": 64, "page_size": 16}


def test_what_another_rank_finds_wrong_is_told_with_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 is told of a folder that is not there; rank 0 has the right one."""
    plain = Connection.send_json

    def lie(self: Connection, kind: Any, **facts: Any) -> None:
        plain(self, kind, **(facts | {"folder": "/nowhere"} if "folder" in facts else facts))

    monkeypatch.setattr(Connection, "send_json", lie)
    with pytest.raises(RankDiedError, match=r"rank 1: .*/nowhere"):
        LLM("demo", **LIMITED, skip_tokenizer_init=True)


@pytest.mark.full
def test_an_engine_that_cannot_load_says_why_and_leaves_nothing(
    broken: Path, tmp_path: Path
) -> None:
    peer = Peer(broken, tmp_path, tensor_parallel_size=2)
    try:
        assert "safetensors" in peer.receive(m.Fatal).message
        assert peer.process.wait(10.0) == 1
        assert_gone([], peer.process.pid)
    finally:
        peer.close()
