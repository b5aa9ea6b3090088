# SPDX-License-Identifier: MIT
"""Latency of what ranks on one machine say to each other: all-reduce and the plan's broadcast.

    python benchmarks/groups.py

Processes on loopback and shared memory, CPU tensors. A sleeping reader is one that found nothing
for longer than it spins; most plans meet one.
"""

import argparse
import multiprocessing as mp
import secrets
import socket
import struct
import time
from multiprocessing.connection import Connection
from statistics import quantiles

import torch

from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.shm_group import shm_communicator
from tokenspeed.spmd.shm_ring import RingReader, RingWriter
from tokenspeed.spmd.torch_group import torch_communicator

CONTEXT = mp.get_context("forkserver")
WARM_UP = 50


def all_reduce_seconds(kind: str, num_ranks: int, num_bytes: int, repeats: int) -> list[float]:
    """Durations of all-reduces of a float32 tensor on rank 0, over "shm" or "gloo"."""
    address = f"benchmark-{secrets.token_hex(6)}"
    if kind == "gloo":
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    ours, theirs = CONTEXT.Pipe(duplex=False)
    processes = [
        CONTEXT.Process(
            target=_all_reduce, args=(kind, address, rank, num_ranks, num_bytes, repeats, theirs)
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    times: list[float] = ours.recv()
    for process in processes:
        process.join()
    return times


def _all_reduce(
    kind: str, address: str, rank: int, count: int, num_bytes: int, repeats: int, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    communicator: Communicator
    if kind == "shm":
        communicator = shm_communicator(rank, count, address)
    else:
        communicator = torch_communicator(rank, count, address, torch.device("cpu"))
    group = communicator.group([tuple(range(count))])
    times = []
    x = torch.zeros(num_bytes // 4)
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        group.all_reduce(x)
        times.append(time.perf_counter() - start)
    communicator.close()
    if rank == 0:
        pipe.send(times[WARM_UP:])


def broadcast_seconds(
    num_readers: int, num_bytes: int, repeats: int, interval_s: float
) -> list[float]:
    """From the writer's call to each reader's return, over all readers.

    A message leaves every `interval_s`; with 0 as soon as all readers have answered the last one.
    """
    name = f"benchmark-{secrets.token_hex(6)}"
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(num_readers)]
    processes = [
        CONTEXT.Process(target=_read, args=(name, num_readers, reader, pipe[1]))
        for reader, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    writer = RingWriter(name, num_readers)
    answers = [RingReader(f"{name}-{reader}", 1, 0) for reader in range(num_readers)]
    writer.connect()
    message = bytearray(num_bytes)
    for _ in range(WARM_UP + repeats):
        struct.pack_into("<q", message, 0, time.monotonic_ns())
        writer.send(message)
        for answer in answers:
            answer.receive(60.0)
        time.sleep(interval_s)
    struct.pack_into("<q", message, 0, 0)
    writer.send(message)
    times: list[float] = []
    for (ours, _), process in zip(pipes, processes, strict=True):
        times += ours.recv()
        process.join()
    writer.close()
    return times


def _read(name: str, num_readers: int, reader: int, pipe: Connection) -> None:
    answer = RingWriter(f"{name}-{reader}", 1)
    ring = RingReader(name, num_readers, reader)
    times = []
    while (message := ring.receive(60.0)) is not None:
        now = time.monotonic_ns()
        sent = struct.unpack_from("<q", message)[0]
        if sent == 0:
            break
        times.append((now - sent) * 1e-9)
        answer.send(b"")
    pipe.send(times[WARM_UP:])
    ring.close()
    answer.close()


def report(what: str, times: list[float]) -> None:
    p50, p99 = (quantiles(times, n=100)[i] * 1e6 for i in (49, 98))
    print(f"{what:46} p50 {p50:9.1f} us   p99 {p99:9.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["torch", "torch.distributed"])
    for num_bytes, name in ((4 << 10, "4 KiB"), (1 << 20, "1 MiB")):
        for kind in ("shm", "gloo"):
            times = all_reduce_seconds(kind, options.ranks, num_bytes, options.repeats)
            report(f"all-reduce {kind} {options.ranks} ranks {name}", times)
    for interval_s, name in ((0.0, "spinning"), (0.002, "sleeping")):
        times = broadcast_seconds(options.ranks - 1, 4096, options.repeats, interval_s)
        report(f"broadcast {options.ranks - 1} {name} readers 4 KiB", times)


if __name__ == "__main__":
    main()
