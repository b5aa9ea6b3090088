# SPDX-License-Identifier: MIT
"""Runs one function on several ranks: virtual ones, threads or processes, over any communicator."""

import multiprocessing as mp
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.shm_group import shm_communicator
from tokenspeed.spmd.simulate import run_ranks
from tokenspeed.spmd.torch_group import torch_communicator

Work = Callable[[Communicator], Any]
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "tests.ranks"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def makers(kind: str, num_ranks: int, timeout_s: float) -> list[Callable[[], Communicator]]:
    """One function for each rank that joins the others over "gloo" or "shm"."""
    if kind == "shm":
        name = f"tokenspeed-test-{secrets.token_hex(6)}"
        return [partial(shm_communicator, r, num_ranks, name, timeout_s) for r in range(num_ranks)]
    at, cpu = f"tcp://127.0.0.1:{free_port()}", torch.device("cpu")
    return [partial(torch_communicator, r, num_ranks, at, cpu, timeout_s) for r in range(num_ranks)]


def on_processes(kind: str, num_ranks: int, work: Work, timeout_s: float = 60) -> list[Any]:
    """Results by rank; what a rank raised in its place, and None where it died."""
    pipes, processes = [], []
    for make in makers(kind, num_ranks, timeout_s):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_body, args=(make, work, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    end = time.monotonic() + timeout_s
    try:
        return [_result(pipe, end) for pipe in pipes]
    finally:
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
            process.kill()
            process.join()


def on_threads(num_ranks: int, work: Work, timeout_s: float = 60) -> list[Any]:
    """Ranks that are threads of this process over shared memory."""
    results: list[Any] = [None] * num_ranks

    def body(rank: int, make: Callable[[], Communicator]) -> None:
        try:
            communicator = make()
            try:
                results[rank] = work(communicator)
            finally:
                communicator.close()
        except BaseException as error:
            results[rank] = error

    threads = [
        threading.Thread(target=body, args=(rank, make), daemon=True)
        for rank, make in enumerate(makers("shm", num_ranks, timeout_s))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    return results


def on_ranks(kind: str, num_ranks: int, work: Work) -> list[Any]:
    """Over "virtual" ranks, "threads" or processes of "shm" or "gloo". Raises what a rank did."""
    if kind == "virtual":
        return run_ranks(num_ranks, work)
    if kind == "threads":
        results = on_threads(num_ranks, work)
    else:
        results = on_processes(kind, num_ranks, work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _body(make: Callable[[], Communicator], work: Work, pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        communicator = make()
        result = work(communicator)
        communicator.close()
    except BaseException as error:
        result = error
    pipe.send(result)
    pipe.close()


def _result(pipe: Any, end: float) -> Any:
    try:
        if not pipe.poll(max(0.0, end - time.monotonic())):
            return TimeoutError("the rank gave no result")
        return pipe.recv()
    except EOFError:
        return None
