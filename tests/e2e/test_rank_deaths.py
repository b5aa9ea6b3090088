# SPDX-License-Identifier: MIT
"""Whichever process of an engine of several ranks ends, whenever: all end, and say why."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import ROOT
from tests.engine_peer import Peer, request
from tests.gateway.processes import BODY, TEXT, Server, server
from tests.rank_processes import (
    assert_gone,
    assert_no_workers_here,
    names_of,
    workers_of,
)
from tokenspeed import LLM, SamplingParams
from tokenspeed.engine import messages as m
from tokenspeed.engine.ranks import local
from tokenspeed.errors import RankDiedError

TP2: dict[str, Any] = {"tensor_parallel_size": 2, "num_pages": 64, "page_size": 16}
SMALL: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True} | TP2
FLAGS = ("--tensor-parallel-size", "2", "--num-pages", "512", "--page-size", "16")
LIMIT_S = 10.0
PROMPT = {"prompt_token_ids": [1, 2, 3]}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def until(happened: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """What it gives as soon as it gives something."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := happened():
            return found
        time.sleep(0.005)
    raise TimeoutError(what)


# -- the engine process and its ranks


@contextmanager
def engine(where: Path, **options: Any) -> Iterator[Peer]:
    peer = Peer("demo", where, **(TP2 | options))
    try:
        yield peer
    finally:
        peer.close()


def worker_of(peer: Peer) -> psutil.Process:
    return until(lambda: workers_of(peer.process.pid), "no worker was started")[0]


def at_once(peer: Peer) -> None:
    """Before the worker can have said hello."""


def after_hello(peer: Peer) -> None:
    worker = worker_of(peer)
    until(lambda: worker.net_connections("tcp"), "the worker has not connected")


def in_load(peer: Peer) -> None:
    worker = worker_of(peer)
    maps = Path(f"/proc/{worker.pid}/maps")
    until(lambda: "/dev/shm/tokenspeed" in maps.read_text(), "no shared memory")


def idle(peer: Peer) -> None:
    peer.receive(m.Ready)
    while peer.receive(m.Heartbeat).has_work:
        pass


def in_a_step(peer: Peer) -> None:
    peer.receive(m.Ready)
    peer.send(request(1, [1, 2, 3], max_tokens=900))
    peer.receive(m.Outputs)


@pytest.mark.parametrize(
    ("moment", "options"),
    [
        pytest.param(at_once, {}, marks=pytest.mark.full),
        (after_hello, {}),
        pytest.param(in_load, {}, marks=pytest.mark.full),
        pytest.param(idle, {}, marks=pytest.mark.full),
        (in_a_step, {}),
        pytest.param(in_a_step, {"overlap_depth": 1}, marks=pytest.mark.full),
        pytest.param(in_load, {"communication": "gloo"}, marks=pytest.mark.full),
        pytest.param(in_a_step, {"communication": "gloo"}, marks=pytest.mark.full),
        pytest.param(
            in_a_step,
            {"tensor_parallel_size": 1, "pipeline_parallel_size": 2},
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_worker_that_is_killed_ends_the_engine_with_a_reason(
    moment: Callable[[Peer], None], options: dict[str, Any], tmp_path: Path
) -> None:
    with engine(tmp_path, **options) as peer:
        moment(peer)
        family = workers_of(peer.process.pid) or [worker_of(peer)]
        start = time.monotonic()
        family[0].kill()
        assert "rank 1" in peer.receive(m.Fatal, timeout_s=LIMIT_S).message
        assert peer.process.wait(LIMIT_S) == 1
        assert time.monotonic() - start < LIMIT_S
        assert_gone(family, peer.process.pid)


@pytest.mark.full
@pytest.mark.parametrize("victim", [1, 2, 3])
def test_one_of_four_that_dies_takes_the_others_along(victim: int, tmp_path: Path) -> None:
    options = {"attention_data_parallel_size": 2, "expert_parallel_size": 4}
    with engine(tmp_path, **options) as peer:
        in_a_step(peer)
        family = workers_of(peer.process.pid)
        assert len(family) == 3
        family[victim - 1].kill()
        assert f"rank {victim}" in peer.receive(m.Fatal, timeout_s=LIMIT_S).message
        assert peer.process.wait(LIMIT_S) == 1
        assert_gone(family, peer.process.pid)


@pytest.mark.full
@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 1.8, 2.5])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_at_any_time_of_the_start_leaves_nothing(
    victim: int, delay_s: float, tmp_path: Path
) -> None:
    with engine(tmp_path) as peer:
        family = [worker_of(peer)]
        time.sleep(delay_s)
        (peer.process if victim == 0 else family[0]).kill()
        if victim:
            assert "rank 1" in peer.receive(m.Fatal, timeout_s=LIMIT_S).message
        assert peer.process.wait(LIMIT_S) in (1, -signal.SIGKILL)
        assert_gone(family, peer.process.pid)


@pytest.mark.full
@pytest.mark.parametrize("moment", [after_hello, in_load, idle, in_a_step])
def test_workers_leave_with_rank_0(moment: Callable[[Peer], None], tmp_path: Path) -> None:
    with engine(tmp_path) as peer:
        moment(peer)
        family = workers_of(peer.process.pid)
        peer.process.kill()
        peer.process.wait()
        assert_gone(family, peer.process.pid, within_s=5.0)


def test_an_engine_that_is_told_to_end_ends_its_workers(tmp_path: Path) -> None:
    """Signals are the gateway's business, for workers as for the engine."""
    with engine(tmp_path) as peer:
        peer.receive(m.Ready)
        family = workers_of(peer.process.pid)
        for process in (peer.process, family[0]):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
        peer.send(request(1, [1, 2], max_tokens=4))
        assert peer.answer(1)[-1].finish_reason == "length"
        assert names_of(peer.process.pid) == []  # gone as soon as all have met
        peer.send(m.Shutdown())
        assert peer.process.wait(LIMIT_S) == 0
        assert_gone(family, peer.process.pid, within_s=1.0)


@pytest.mark.full
def test_a_worker_that_stands_still_does_not_outlive_the_engine(tmp_path: Path) -> None:
    with engine(tmp_path) as peer:
        peer.receive(m.Ready)
        family = workers_of(peer.process.pid)
        family[0].suspend()
        start = time.monotonic()
        peer.send(m.Shutdown())
        assert peer.process.wait(LIMIT_S) == 0
        assert time.monotonic() - start < 2.0  # the gateway would kill it, and leave the worker
        assert_gone(family, peer.process.pid)


# -- behind the gateway


def family_of(made: Server) -> tuple[psutil.Process, list[psutil.Process]]:
    process = made.engine()
    workers = workers_of(process.pid)
    assert len(workers) == 1
    return process, workers


def test_idle_ranks_rest_and_the_death_of_one_ends_the_server() -> None:
    with server(*FLAGS, real=True) as made:
        process, workers = family_of(made)
        everyone = [process, *workers]
        before = sum(sum(p.cpu_times()[:2]) for p in everyone)
        time.sleep(2.0)
        assert sum(sum(p.cpu_times()[:2]) for p in everyone) - before <= 0.02 * 2.0 * len(everyone)
        body = {**BODY, "max_tokens": 2000}
        with httpx.stream("POST", made.url + TEXT, json=body, timeout=LIMIT_S) as reply:
            lines = reply.iter_lines()
            next(lines)
            workers[0].kill()
            assert any("the engine stopped" in line for line in lines)
        assert made.ready() in (503, 0)
        assert made.process.wait(LIMIT_S) == 1
        said = made.process.stderr.read().decode()
        assert "rank 1 (pid" in said
        assert "nanobind" not in said
        assert "Traceback" not in said
        assert_gone(everyone, process.pid)


@pytest.mark.full
@pytest.mark.parametrize("who", ["gateway", "engine"])
def test_no_process_outlives_a_part_that_is_killed(who: str) -> None:
    with server(*FLAGS, real=True) as made:
        process, workers = family_of(made)
        if who == "gateway":
            made.process.kill()
            made.process.wait()
        else:
            process.kill()
            assert made.process.wait(LIMIT_S) == 1
        assert_gone([process, *workers], process.pid)


@pytest.mark.full
def test_sigterm_lets_requests_end_and_takes_all_along() -> None:
    with server(*FLAGS, real=True) as made:
        process, workers = family_of(made)
        body = {**BODY, "max_tokens": 200, "ignore_eos": True}
        with httpx.stream("POST", made.url + TEXT, json=body, timeout=LIMIT_S) as reply:
            lines = reply.iter_lines()
            next(lines)
            for each in (made.process, process, workers[0]):  # as a terminal's Ctrl-C reaches all
                each.send_signal(signal.SIGINT)
            rest = list(lines)
        assert rest[-2:-1] == ["data: [DONE]"] or "data: [DONE]" in rest
        assert made.process.wait(LIMIT_S) == 0
        assert made.process.stderr.read().decode().count("Traceback") == 0
        assert_gone([process, *workers], process.pid)


# -- in a program of the user's


def test_a_mesh_that_does_not_divide_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def started(*arguments: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(local.LocalRanks, "start", started)
    for options, why in (
        ({"tensor_parallel_size": 3}, "3"),
        ({"tensor_parallel_size": 1, "pipeline_parallel_size": 99}, "99|stage"),
        ({"tensor_parallel_size": 2, "expert_parallel_size": 3}, "3"),
    ):
        with pytest.raises(ValueError, match=why):
            LLM("demo", **(SMALL | options))


def test_a_rank_that_dies_ends_an_llm_and_another_can_be_made() -> None:
    cpus = os.sched_getaffinity(0)
    with LLM("demo", **SMALL) as llm:
        (want,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
        (worker,) = workers_of(os.getpid())
        worker.kill()
        for _ in range(2):
            with pytest.raises(RankDiedError, match="rank 1"):
                llm.generate(PROMPT, GREEDY, use_tqdm=False)
    assert_no_workers_here()
    assert os.sched_getaffinity(0) == cpus
    with LLM("demo", **SMALL) as llm, LLM("demo", **SMALL) as other:
        assert len(workers_of(os.getpid())) == 2
        for each in (llm, other, llm):
            (got,) = each.generate(PROMPT, GREEDY, use_tqdm=False)
            assert got.outputs[0].token_ids == want.outputs[0].token_ids
        llm.close()
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate(PROMPT, GREEDY, use_tqdm=False)
        other.generate(PROMPT, GREEDY, use_tqdm=False)
    assert_no_workers_here()


BEGIN = f"""
from tokenspeed import LLM, SamplingParams
llm = LLM("demo", **{SMALL!r})
many = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
"""
ENDS = {
    "of the program": ("print('here', flush=True)", 0, ""),
    "by an error": ("print('here', flush=True); raise KeyError('mine')", 1, "KeyError: 'mine'"),
    "by del": ("del llm; print('here', flush=True); import time; time.sleep(60)", None, ""),
    "by Ctrl-C": (
        "print('here', flush=True); llm.generate({'prompt_token_ids': [1]}, many, use_tqdm=False)",
        -signal.SIGINT,
        "KeyboardInterrupt",
    ),
}


@pytest.mark.parametrize(
    "how", ["by Ctrl-C", *(pytest.param(h, marks=pytest.mark.full) for h in list(ENDS)[:3])]
)
def test_an_llm_that_nobody_closed_leaves_no_worker(how: str) -> None:
    code, status, says = ENDS[how]
    script = BEGIN + "import os, psutil\n"
    script += "print([c.pid for c in psutil.Process().children()], flush=True)\n" + code
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        pids = process.stdout.readline().strip("[]\n").split(",")
        family = [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]
        assert process.stdout.readline() == "here\n"
        if how == "by Ctrl-C":
            time.sleep(0.3)
            os.killpg(process.pid, signal.SIGINT)
        if status is None:
            assert_gone(family, process.pid)
            process.kill()
        _, said = process.communicate(timeout=LIMIT_S)
        assert status is None or process.returncode == status
        assert says in said
        assert "nanobind" not in said
        assert "worker" not in said
        assert_gone(family, process.pid)
    finally:
        process.kill()
        process.communicate()
