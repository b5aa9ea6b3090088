# SPDX-License-Identifier: MIT
"""The broadcast ring: order, sizes, idle readers, a slow reader, deaths."""

import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import CONTEXT
from tokenspeed.errors import RankDiedError
from tokenspeed.spmd.shm_ring import RingReader, RingWriter

CAPACITY = 4096


def messages(count: int) -> Iterator[bytes]:
    """From nothing to many times the ring, the same in every process."""
    random_ = random.Random(7)
    for index in range(count):
        size = random_.choice(
            [0, 1, 7, 8, 100, 1000, 4088, 4096, 5000, 300_000 * (index % 50 == 0)]
        )
        yield random_.randbytes(size)


class Readers:
    """Processes that read a ring, and the writer."""

    def __init__(self, count: int, body: Callable[..., Any], *arguments: Any) -> None:
        self.name = f"tokenspeed-test-{secrets.token_hex(6)}"
        self.processes, self.pipes = [], []
        for reader in range(count):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            target = (body, theirs, self.name, count, reader, *arguments)
            self.processes.append(CONTEXT.Process(target=_run, args=target, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
        self.writer = RingWriter(self.name, count, 20.0, CAPACITY)
        self.writer.connect()

    def results(self) -> list[Any]:
        results = []
        for pipe in self.pipes:
            assert pipe.poll(30)
            results.append(pipe.recv())
        for process in self.processes:
            process.join(10)
        return results


def _run(
    body: Callable[..., Any], pipe: Any, name: str, count: int, reader: int, *more: Any
) -> None:
    ring = RingReader(name, count, reader, 20.0, CAPACITY)
    try:
        pipe.send(body(ring, reader, *more))
    except RankDiedError as error:
        pipe.send(error)
    ring.close()


def read_all(ring: RingReader, reader: int, count: int) -> int:
    for index, expected in enumerate(messages(count)):
        if index % 97 == reader:
            time.sleep(0.002)  # behind, now and then
        if ring.receive(20.0) != expected:
            return index
    return count


def test_every_reader_gets_every_message() -> None:
    readers = Readers(3, read_all, 600)
    assert not [entry for entry in os.listdir("/dev/shm") if entry.startswith(readers.name)]
    for message in messages(600):
        readers.writer.send(message)
    assert readers.results() == [600, 600, 600]
    readers.writer.close()


def wait_idle(ring: RingReader, reader: int) -> tuple[list[bytes | None], float]:
    start = time.process_time()
    got = [ring.receive(0.0), ring.receive(0.2)]
    used = time.process_time() - start
    got.append(ring.receive(20.0))
    return got, used


def test_an_idle_reader_sleeps() -> None:
    readers = Readers(1, wait_idle)
    time.sleep(0.6)
    readers.writer.send(bytearray(b"late"))
    ((got, used),) = readers.results()
    assert got == [None, None, b"late"]
    assert used < 0.05
    readers.writer.close()


def read_to_the_end(ring: RingReader, reader: int) -> list[bytes | str]:
    got: list[bytes | str] = []
    try:
        while (message := ring.receive(20.0)) is not None:
            got.append(message)
    except RankDiedError as error:
        got.append(str(error))
    return got


def test_what_was_sent_is_read_after_the_writer_left() -> None:
    readers = Readers(2, read_to_the_end)
    for text in (b"one", b"two"):
        readers.writer.send(memoryview(text))
    readers.writer.close()
    assert readers.results() == [[b"one", b"two", "rank 0 has left"]] * 2


def die(ring: RingReader, reader: int) -> None:
    if reader == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ring.receive(20.0)
    while ring.receive(20.0) is not None:
        pass


def test_a_dead_reader_ends_the_writers_wait_and_the_other_readers() -> None:
    readers = Readers(2, die)
    start = time.monotonic()
    with pytest.raises(RankDiedError, match=r"rank 2 died \(process"):
        readers.writer.send(bytes(100 * CAPACITY))
    assert time.monotonic() - start < 3
    assert readers.pipes[0].poll(5)
    assert "rank 2 died" in str(readers.pipes[0].recv())
    readers.writer.close()


def write_and_die(pipe: Any, name: str) -> None:
    writer = RingWriter(name, 1, 20.0, CAPACITY)
    writer.connect()
    writer.send(b"last")
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def poll(reader: RingReader) -> None:
    """Short waits notice a death too."""
    while reader.receive(0.01) is None:
        pass


def test_a_dead_writer_ends_the_readers_wait() -> None:
    name = f"tokenspeed-test-{secrets.token_hex(6)}"
    process = CONTEXT.Process(target=write_and_die, args=(None, name), daemon=True)
    process.start()
    reader = RingReader(name, 1, 0, 20.0, CAPACITY)
    assert reader.receive(20.0) == b"last"
    start = time.monotonic()
    with pytest.raises(RankDiedError, match="rank 0 died"):
        poll(reader)
    assert time.monotonic() - start < 3
    reader.close()
    process.join()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="1 to 63 readers"):
        RingWriter("x", 0)
    with pytest.raises(ValueError, match="reader 2 of 2"):
        RingReader("x", 2, 2, 0.1)
    with pytest.raises(ValueError, match="shared memory a/b"):
        RingWriter("a/b", 1)
    with pytest.raises(ValueError, match=r"No space|too large|Cannot allocate"):
        RingWriter("tokenspeed-test-huge", 1, 1.0, 1 << 50)
    assert "tokenspeed-test-huge" not in os.listdir("/dev/shm")
    with pytest.raises(RankDiedError, match="no rank made shared memory"):
        RingReader("tokenspeed-test-nobody", 1, 0, 0.05)
    writer = RingWriter(f"tokenspeed-test-{os.getpid()}", 1, 0.2)
    with pytest.raises(ValueError, match="File exists"):
        RingWriter(f"tokenspeed-test-{os.getpid()}", 1)
    with pytest.raises(RankDiedError, match="rank 1 does not answer"):
        writer.connect()
    with pytest.raises(TypeError, match="bytes-like"):
        writer.send("text")  # type: ignore[arg-type]
    writer.close()
