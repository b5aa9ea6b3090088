# SPDX-License-Identifier: MIT
"""How ranks meet and part: who may join, who keeps nobody waiting, and what a death says."""

import contextlib
import dataclasses
import errno
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tokenspeed.config import EngineConfig
from tokenspeed.engine.part import Agreement
from tokenspeed.engine.ranks import local, meeting, wires
from tokenspeed.engine.ranks.connection import Connection, Kind, facts_of
from tokenspeed.engine.ranks.crew import Crew, result_body
from tokenspeed.engine.ranks.hello import Hello, refusal
from tokenspeed.engine.ranks.meeting import Meeting, introduce
from tokenspeed.engine.ranks.muster import Mustered, Neighbours, muster
from tokenspeed.errors import RankDiedError
from tokenspeed.execution.step import StepOutput
from tokenspeed.execution.step_message import encode_output

MINE = Hello.of_this_process(0, "secret", "digest")
OTHER = Hello.of_this_process(1, "secret")
WAIT_S = 10.0


def nobody_ended() -> None:
    """Of the processes that were started."""


# -- silence


def test_a_machine_that_is_cut_off_is_noticed_within_ten_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        connection = Connection.open(host, port, WAIT_S)
        with contextlib.closing(connection):
            held = connection._socket
            idle, interval, count, unacknowledged_ms = (
                held.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            )
            assert held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert 0 < idle + interval * count < 10
            assert 0 < unacknowledged_ms < 10_000


@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_when_the_system_gives_a_peer_up_it_is_dead(
    timeout_s: float | None,
) -> None:
    class GivenUp:
        """The end of a connection over which nothing came back."""

        def setsockopt(self, *_: int) -> None: ...

        def settimeout(self, _: float | None) -> None: ...

        def recv_into(self, _: memoryview) -> int:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    with pytest.raises(RankDiedError, match="rank 1 cannot be reached any more"):
        Connection(GivenUp(), "rank 1").receive(timeout_s)  # type: ignore[arg-type]


# -- hellos


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token": "secreT"}, "does not know this engine's token"),
        ({"token": "sécret\ud800"}, "does not know this engine's token"),
        ({"version": "0.0.1"}, "rank 1 has version '0.0.1', rank 0 has"),
        ({"layouts": "plan 0, step 1"}, "rank 1 has layouts 'plan 0, step 1', rank 0 has"),
        ({"machine": "pdp11"}, "rank 1 has machine 'pdp11', rank 0 has"),
        ({"config": "other"}, "rank 1 was started with other options than rank 0"),
        ({"rank": 0}, "there is no rank 0 among 3"),
        ({"rank": 3}, "there is no rank 3 among 3"),
        ({"rank": -1}, "there is no rank -1 among 3"),
        ({"rank": 2}, "there is a rank 2 already"),
    ],
)
def test_who_may_not_join(change: dict[str, Any], why: str) -> None:
    other = dataclasses.replace(OTHER, **change)
    assert why in (refusal(MINE, other, 3, {2}) or "")


@pytest.mark.parametrize("config", ["", "digest"])
def test_who_may_join(config: str) -> None:
    other = Hello.from_facts(dataclasses.replace(OTHER, config=config).facts())
    assert refusal(MINE, other, 2, set()) is None


@pytest.mark.parametrize(
    "change", [{"rank": "1"}, {"rank": True}, {"token": 5}, {"host": []}, {"pid": 1.0}, {"new": 1}]
)
def test_facts_of_other_types_are_no_hello(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a hello"):
        Hello.from_facts(OTHER.facts() | change)
    with pytest.raises(ValueError, match="not a hello"):
        Hello.from_facts({})


# -- meeting


class Place:
    """A meeting that gathers on another thread."""

    def __init__(self, num_ranks: int, timeout_s: float = WAIT_S) -> None:
        self.meeting = Meeting(token="secret")
        self._thread = ThreadPoolExecutor(1)
        self.gathered: Future[Any] = self._thread.submit(
            self.meeting.gather, MINE, num_ranks, timeout_s, nobody_ended
        )

    def stranger(self, data: bytes = b"") -> socket.socket:
        made = socket.create_connection((self.meeting.host, self.meeting.port), timeout=WAIT_S)
        made.sendall(data)
        return made

    def join(self, hello: Hello) -> Future[Any]:
        """What `introduce` says on a thread of its own."""
        result: Future[Any] = Future()

        def body() -> None:
            try:
                result.set_result(introduce(self.meeting.host, self.meeting.port, hello, WAIT_S))
            except Exception as error:
                result.set_exception(error)

        threading.Thread(target=body, daemon=True).start()
        return result


@contextlib.contextmanager
def place(num_ranks: int, timeout_s: float = WAIT_S) -> Iterator[Place]:
    made = Place(num_ranks, timeout_s)
    try:
        yield made
    finally:
        with contextlib.suppress(Exception):
            for connection in made.gathered.result(WAIT_S)[0].values():
                connection.close()
        made.meeting.close()
        made._thread.shutdown()


def rank(number: int, **change: Any) -> Hello:
    return dataclasses.replace(OTHER, rank=number, **change)


def test_all_ranks_come_and_are_welcomed() -> None:
    with place(4) as at:
        joined = {number: at.join(rank(number)) for number in (3, 1, 2)}
        connections, hellos = at.gathered.result(WAIT_S)
        assert sorted(connections) == sorted(hellos) == [1, 2, 3]
        for number, connection in connections.items():
            assert connection.peer.startswith(f"rank {number} (pid ")
            connection.send_json(Kind.WELCOME, you=number)
        for number, each in joined.items():
            connection, facts = each.result(WAIT_S)
            assert facts == {"you": number}
            connection.close()


def test_strangers_keep_nobody_waiting() -> None:
    """Silence, half a head, junk, a huge length, no JSON, no hello, another kind."""
    head = struct.Struct("<BQ").pack
    hello = json.dumps(OTHER.facts()).encode()
    said = [
        b"",
        b"\x01\x02",
        b"GET / HTTP/1.1\r\n\r\n",
        head(Kind.HELLO, 1 << 40),
        head(Kind.HELLO, 1 << 30) + b"x" * 1000,
        head(Kind.HELLO, 4) + b"{{{{",
        head(Kind.HELLO, 2) + b"{}",
        head(Kind.HELLO, 1000) + b"{",
        head(Kind.READY, len(hello)) + hello,
        head(77, 0),
    ]
    with place(3) as at, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(at.stranger(data)) for data in said * 3]
        strangers.pop().close()
        start = time.monotonic()
        for number in (1, 2):
            stack.enter_context(contextlib.closing(_Joined(at.join(rank(number)))))
        at.gathered.result(WAIT_S)
        assert time.monotonic() - start < 2.0
        at.meeting.close()
        for stranger in strangers:  # cut off with the end of the meeting, if not before
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        assert time.monotonic() - start < 4.0


class _Joined:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def close(self) -> None:
        with contextlib.suppress(RankDiedError, TimeoutError):
            self._future.result(0)


def test_another_token_is_turned_away_and_the_meeting_goes_on() -> None:
    with place(2) as at:
        wrong = at.join(rank(1, token="guess"))
        with pytest.raises(RankDiedError, match="does not know this engine's token"):
            wrong.result(WAIT_S)
        right = at.join(rank(1))
        connections, _ = at.gathered.result(WAIT_S)
        connections[1].send_json(Kind.WELCOME)
        right.result(WAIT_S)[0].close()


@pytest.mark.parametrize(
    ("hellos", "why"),
    [
        ([rank(1, version="9")], "rank 1 has version '9'"),
        ([rank(5)], "there is no rank 5 among 3"),
        ([rank(2), rank(2)], "there is a rank 2 already"),
    ],
)
def test_one_of_ours_that_does_not_fit_ends_the_start(hellos: list[Hello], why: str) -> None:
    with place(3) as at:
        joined = [at.join(hello) for hello in hellos]
        with pytest.raises(RankDiedError, match=f"a rank may not join: {why}"):
            at.gathered.result(WAIT_S)
        told = [str(each.exception(WAIT_S)) for each in joined]
        assert sum(f"rank 0 refuses this rank: {why}" in text for text in told) == 1


def test_ranks_that_never_come_are_named() -> None:
    with place(5, timeout_s=0.5) as at:
        joined = at.join(rank(2))
        with pytest.raises(RankDiedError, match=r"rank\(s\) 1, 3, 4 of 5 did not come within"):
            at.gathered.result(WAIT_S)
        assert isinstance(joined.exception(WAIT_S), RankDiedError)


def test_a_process_that_ends_before_it_comes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    command = (sys.executable, "-c", "raise SystemExit(7)")
    monkeypatch.setattr(local, "COMMAND", command)
    config = EngineConfig.of(tensor_parallel_size=3)
    start = time.monotonic()
    with pytest.raises(RankDiedError, match=r"rank [12] \(pid \d+\) ended with status 7"):
        muster(config, meeting.__file__, 1, None)
    assert time.monotonic() - start < WAIT_S


# -- the others, as rank 0 sees them


class Pair:
    """A crew of two ranks whose other ends are here."""

    def __init__(self) -> None:
        self.far: dict[int, Connection] = {}
        near = {}
        for number in (1, 2):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.far[number] = Connection.open(*listener.getsockname(), WAIT_S)
                near[number] = Connection(listener.accept()[0], f"rank {number} (pid 1 on here)")
        self.ends: list[str] = []
        self.crew = Crew(near, None, frozenset(), lambda: self.ends.append("ended"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.crew.close()
    for connection in made.far.values():
        connection.close()


def output(number: int) -> StepOutput:
    return StepOutput(np.array([number], np.int32), {}, {})


def test_results_are_kept_by_index_and_in_order(pair: Pair) -> None:
    for number in (1, 2):
        for dp, rank_ in ((0, 1), (1, 2)):
            body = result_body(dp, encode_output(output(10 * dp + number)))
            pair.far[rank_].send(Kind.RESULT, body)
    found = [pair.crew.results([0, 1]), pair.crew.results([1]), pair.crew.results([0])]
    got = [{dp: out.words.tolist() for dp, out in each.items()} for each in found]
    assert got == [{0: [1], 1: [11]}, {1: [12]}, {0: [2]}]


def test_steps_go_to_all_and_the_least_number_of_pages_is_taken(pair: Pair) -> None:
    pair.crew.send_step(b"step")
    for connection in pair.far.values():
        assert connection.receive(WAIT_S) == (Kind.STEP, b"step")
    for number, pages in ((1, 70), (2, 50)):
        pair.far[number].send_json(Kind.SIZED, **Agreement(pages).facts())
    assert Mustered(pair.crew).agree(Agreement(60)) == Agreement(50)
    for connection in pair.far.values():
        kind, body = connection.receive(WAIT_S)
        assert (kind, facts_of(body)) == (Kind.PAGES, {"num_pages": 50})


def test_a_rank_that_fails_says_why_and_the_others_are_told_to_leave(pair: Pair) -> None:
    told: Future[RankDiedError] = Future()
    pair.crew.on_death(told.set_result)
    pair.far[2].send(Kind.FAILED, b"out of memory")
    assert str(told.result(WAIT_S)) == "rank 2: out of memory"
    for connection in pair.far.values():
        assert connection.receive(WAIT_S)[0] is Kind.BYE
    pair.far[1].close()
    for call in (pair.crew.check, pair.crew.find_cause, lambda: pair.crew.send_step(b"")):
        with pytest.raises(RankDiedError, match="rank 2: out of memory"):
            call()
    again: Future[RankDiedError] = Future()
    pair.crew.on_death(again.set_result)  # too late to be told, so it is told now
    assert "out of memory" in str(again.result(0))


@pytest.mark.parametrize("wait", ["results", "answers", "wait_for"])
def test_the_end_of_a_connection_wakes_every_wait(pair: Pair, wait: str) -> None:
    calls = {
        "results": lambda: pair.crew.results([0]),
        "answers": lambda: pair.crew.answers(Kind.SIZED),
        "wait_for": lambda: pair.crew.wait_for(Kind.READY),
    }
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(calls[wait]) for _ in range(2)]
        time.sleep(0.1)
        assert not any(future.done() for future in waiting)
        pair.far[1].close()
        for future in waiting:
            with pytest.raises(RankDiedError, match=r"rank 1 \(pid 1 on here\)"):
                future.result(WAIT_S)


def test_another_word_than_was_due_is_an_error(pair: Pair) -> None:
    pair.far[1].send(Kind.READY)
    with pytest.raises(RankDiedError, match="said READY where SIZED was due"):
        pair.crew.answers(Kind.SIZED)


def test_junk_from_a_rank_is_its_end(pair: Pair) -> None:
    pair.far[1].send(Kind.RESULT, b"\x01")
    with pytest.raises(RankDiedError):
        pair.crew.results([0])


def test_closing_says_goodbye_once(pair: Pair) -> None:
    pair.crew.close()
    pair.crew.close()
    assert pair.ends == ["ended"]
    assert pair.far[1].receive(WAIT_S) == (Kind.BYE, b"")
    with pytest.raises(RankDiedError):
        pair.far[1].receive(WAIT_S)


def test_the_cause_is_told_in_place_of_its_consequence(pair: Pair) -> None:
    pair.far[2].close()
    with pytest.raises(RankDiedError, match="rank 2"):
        pair.crew.close_after(RankDiedError("a collective failed"))
    assert pair.ends == ["ended"]


def test_an_error_of_rank_0_stays_the_error(pair: Pair) -> None:
    pair.far[2].send(Kind.FAILED, b"the same, seen by rank 2")
    pair.crew.close_after(ValueError("mine"))
    assert pair.ends == ["ended"]


# -- where things are


def test_a_worker_has_its_cores_before_anything_starts_threads(python: str) -> None:
    code = "import sys, tokenspeed.engine.ranks.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([python, "-c", code], check=True, cwd=ROOT)


def test_ranks_of_one_machine_are_neighbours() -> None:
    ranks = Neighbours({0: "a", 1: "b", 2: "a", 3: "b", 4: "b"})
    assert ranks.hosts == {"a", "b"}
    assert ranks.of(2) == [0, 2]
    assert [ranks.share(r) for r in range(5)] == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_tensors_travel_in_shared_memory_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert wires.choose_wires(2, cpu, {"a"}, "127.0.0.1", "auto")["kind"] == "shm"
    assert wires.choose_wires(2, cpu, {"a", "b"}, "127.0.0.1", "auto")["kind"] == "torch"
    monkeypatch.setattr(wires, "can_share_memory", lambda: False)
    found = wires.choose_wires(2, cpu, {"a"}, "127.0.0.1", "auto")
    assert wires.choose_wires(2, cpu, {"a"}, "127.0.0.1", "gloo")["kind"] == "torch"
    for asked in ("shm", "nccl"):
        with pytest.raises(ValueError, match=f"communication: {asked} does not connect"):
            wires.choose_wires(2, cpu, {"a"}, "127.0.0.1", asked)
    assert (found["kind"], found["device"], found["num_ranks"]) == ("torch", "cpu", 2)
    assert found["address"].startswith("tcp://127.0.0.1:")


def test_names_in_shared_memory_are_cleared_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(wires, "SHARED_MEMORY", tmp_path)
    ring, tensors = wires.new_name(), wires.new_name()
    for name in (ring, f"{tensors}-all", f"{tensors}-1-0", "tokenspeed-of-others"):
        (tmp_path / name).touch()
    wires.clear_away(ring, "tcp://127.0.0.1:1", None, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenspeed-of-others"]


def test_without_shared_memory_to_write_to_tensors_travel_over_gloo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(wires, "SHARED_MEMORY", tmp_path / "missing")
    cpu = torch.device("cpu")
    assert wires.choose_wires(2, cpu, {"a"}, "127.0.0.1", "auto")["kind"] == "torch"
    with pytest.raises(ValueError, match="communication: shm does not connect"):
        wires.choose_wires(2, cpu, {"a"}, "127.0.0.1", "shm")
    monkeypatch.setattr(wires, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # mounted for reading only
    assert wires.choose_wires(2, cpu, {"a"}, "127.0.0.1", "auto")["kind"] == "torch"
