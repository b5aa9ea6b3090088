# SPDX-License-Identifier: MIT
"""The engine process over real sockets: starts, serves, survives junk and signals, and leaves."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_peer import WAIT_S, Peer, request
from tokenspeed.engine import messages as m
from tokenspeed.engine.wire import encode

PARENT = (
    "import subprocess, sys; child = subprocess.Popen(sys.argv[1:]); "
    "print(child.pid, flush=True); child.wait()"
)


@pytest.fixture(scope="module")
def peer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    found = Peer(folder, tmp_path_factory.mktemp("ipc"), max_model_len=256)
    yield found
    found.close()


def test_it_loads_and_says_so(peer: Peer) -> None:
    assert peer.receive(m.Loading).fraction == 0.0
    ready = peer.receive(m.Ready)
    assert ready == m.Ready(max_model_len=256, vocab_size=258, num_pages=64, page_size=16)


def test_it_answers_and_tells_what_it_did(peer: Peer) -> None:
    peer.send(request(2**64 - 1, [1, 2, 3], max_tokens=20))
    outputs = peer.answer(2**64 - 1)
    assert len([t for o in outputs for t in o.token_ids]) == 20
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].queue_s >= 0
    assert outputs[-1].prefill_s > 0
    stats = peer.receive(m.StatsMessage).stats
    while stats.num_running:
        stats = peer.receive(m.StatsMessage).stats
    while peer.receive(m.Heartbeat).num_steps < 4:  # two to warm up, and drafts save some
        pass


def test_bad_requests_are_rejected_and_junk_is_dropped(peer: Peer) -> None:
    peer.send(b"", b"\x01", b"\xff" * 50, encode(m.Fatal("not yours")))
    peer.send(request(5, []), request(6, [999]), request(7, [1] * 256))
    rejected = [peer.receive(m.Rejected) for _ in range(3)]
    assert [r.request_id for r in rejected] == [5, 6, 7]
    assert [r.field for r in rejected] == ["prompt"] * 3
    assert rejected[2].code == "context_length_exceeded"
    peer.send(m.AbortRequest(12345), m.FlushCache(), request(8, [1, 2], max_tokens=2))
    assert peer.answer(8)[-1].finish_reason == "length"


def test_prefix_orders_are_answered(peer: Peer) -> None:
    peer.send(
        m.RetainPrefix(2**54, [1, 2, 3], b"s", m.Retention(5.0, pinned=True)),
        m.RetainPrefix(2, [2**63, 1], retention=m.Retention(float("nan"))),
        m.ReleasePrefix(3, []),
    )
    answers = [peer.receive(m.PrefixPages) for _ in range(3)]
    assert [(a.call_id, a.num_pages) for a in answers] == [(2**54, 0), (2, 0), (3, 0)]


def test_an_aborted_request_falls_silent(peer: Peer) -> None:
    peer.send(request(20, [1, 2, 3], max_tokens=200))
    peer.receive(m.Outputs)
    peer.send(m.AbortRequest(20), request(21, [4], max_tokens=60))
    late, outputs = 0, []
    while not outputs or outputs[-1].finish_reason is None:
        batch = peer.receive(m.Outputs).outputs
        outputs += [o for o in batch if o.request_id == 21]
        late += sum(o.request_id == 20 for o in batch if outputs)
    assert late == 0


def test_heartbeats_go_on_while_idle(peer: Peer) -> None:
    while (beat := peer.receive(m.Heartbeat)).has_work:
        pass
    later = peer.receive(m.Heartbeat, timeout_s=5.0)
    assert not later.has_work
    assert later.num_steps == beat.num_steps > 0


def test_signals_are_the_gateways_business_and_shutdown_ends_it(peer: Peer) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        peer.process.send_signal(number)
    peer.send(request(30, [1], max_tokens=3))
    assert peer.answer(30)[-1].finish_reason == "length"
    peer.send(m.Shutdown())
    assert peer.process.wait(WAIT_S) == 0


def test_a_model_that_cannot_be_loaded_is_fatal(tmp_path: Path) -> None:
    peer = Peer(tmp_path, tmp_path)
    try:
        assert "config.json" in peer.receive(m.Fatal).message
        assert peer.process.wait(WAIT_S) == 1
    finally:
        peer.close()


def test_it_dies_with_its_parent(folder: Path, tmp_path: Path) -> None:
    peer = Peer(folder, tmp_path, wrap=PARENT)
    try:
        assert peer.process.stdout is not None
        child = int(peer.process.stdout.readline())
        peer.receive(m.Heartbeat)
        peer.process.kill()
        peer.process.wait()
        end = time.monotonic() + 5.0
        while _alive(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not _alive(child)
    finally:
        peer.close()


def _alive(process: int) -> bool:
    """Whether a process runs; one that waits to be reaped by somebody else does not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
