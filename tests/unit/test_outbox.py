# SPDX-License-Identifier: MIT
"""`Outbox`: each gateway gets its own, all get what is about the engine, the dead get nothing."""

import pytest
import zmq

from tokenspeed.engine import messages as m
from tokenspeed.engine import outbox as module
from tokenspeed.engine.outbox import Outbox
from tokenspeed.engine.wire import Decoder


@pytest.fixture
def three(tmp_path):
    context = zmq.Context()
    addresses = [f"ipc://{tmp_path}/{number}" for number in range(3)]
    pulls = [context.socket(zmq.PULL) for _ in addresses]
    for pull, address in zip(pulls, addresses, strict=True):
        pull.bind(address)
    outbox = Outbox(context, addresses)
    yield outbox, pulls
    outbox.close()
    context.destroy(linger=0)


def receive(pull):
    """All that is there, decoded; waits for the first."""
    found, decoder = [], Decoder(m.Up)
    while pull.poll(1000 if not found else 50):
        found.append(decoder.decode(pull.recv()))
    return found


def output(gateway: int, number: int) -> m.TokenOutput:
    return m.TokenOutput(gateway << m.GATEWAY_SHIFT | number, [number])


def test_a_step_is_one_message_for_each_gateway_that_has_part_in_it(three):
    outbox, pulls = three
    mine, other = [output(0, 1), output(0, 2)], [output(2, 3)]
    outbox.deliver([mine[0], *other, mine[1]])
    outbox.answer(1 << m.GATEWAY_SHIFT, m.PrefixPages(1 << m.GATEWAY_SHIFT, 4))
    assert receive(pulls[0]) == [m.Outputs(mine)]
    assert receive(pulls[1]) == [m.PrefixPages(1 << m.GATEWAY_SHIFT, 4)]
    assert receive(pulls[2]) == [m.Outputs(other)]
    outbox.send(m.Loading(0.5, "half"))
    assert [receive(pull) for pull in pulls] == [[m.Loading(0.5, "half")]] * 3


def test_what_is_dropped_gets_nothing_and_the_first_is_never_dropped(three):
    outbox, pulls = three
    outbox.drop(1)
    outbox.drop(0)
    outbox.deliver([output(0, 1), output(1, 2)])
    assert receive(pulls[0]) == [m.Outputs([output(0, 1)])]
    assert receive(pulls[1]) == []


def test_one_that_does_not_read_is_dropped_and_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    context = zmq.Context()
    first = context.socket(zmq.PULL)
    first.bind(f"ipc://{tmp_path}/0")
    outbox = Outbox(context, [f"ipc://{tmp_path}/0", f"ipc://{tmp_path}/1"])  # nobody is at 1
    for number in range(1100):
        outbox.deliver([output(1, number)])
    assert receive(first) == [m.GatewayStuck(1)]
    outbox.close()
    context.destroy(linger=0)
