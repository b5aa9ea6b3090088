# SPDX-License-Identifier: MIT
"""`Outbox`: the engine's way up, to one gateway or to several. Knows addresses, no requests.

With several, each gets the outputs of its own requests, in one message a step, and all get what is
about the engine. The first may hold the engine up; another one that is gone, or does not read for
`PATIENCE_S`, is dropped.
"""

import contextlib
from collections import defaultdict
from collections.abc import Sequence

import zmq

from tokenspeed.engine import messages as m
from tokenspeed.engine.wire import encode

LINGER_MS = 1000
PATIENCE_S = 5.0


class Outbox:
    """One per thread: a ZeroMQ socket belongs to the thread that uses it."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", addresses: Sequence[str]) -> None:
        """A gateway's number is its address's place in the list."""
        self._alone = len(addresses) == 1
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        for number, address in enumerate(addresses):
            self._sockets[number] = made = context.socket(zmq.PUSH)
            made.linger = LINGER_MS
            if number:
                made.sndtimeo = int(PATIENCE_S * 1000)
            made.connect(address)

    def send(self, message: m.Up) -> None:
        """To all gateways. Waits while one is behind."""
        data = encode(message)
        for number in list(self._sockets):
            self._put(number, data)

    def offer(self, message: m.Up) -> None:
        """To all gateways but those that are behind."""
        data = encode(message)
        for socket in self._sockets.values():
            with contextlib.suppress(zmq.Again):
                socket.send(data, zmq.NOBLOCK)

    def answer(self, request_id: int, message: m.Up) -> None:
        """To the gateway that gave this number. Waits while it is behind."""
        self._put(m.gateway_of(request_id), encode(message))

    def deliver(self, outputs: list[m.TokenOutput]) -> None:
        """What a step produced, to each gateway its own. Waits while one is behind."""
        if self._alone:
            self.answer(0, m.Outputs(outputs))
            return
        of_gateway: defaultdict[int, list[m.TokenOutput]] = defaultdict(list)
        for output in outputs:
            of_gateway[m.gateway_of(output.request_id)].append(output)
        for number, own in of_gateway.items():
            self._put(number, encode(m.Outputs(own)))

    def drop(self, number: int) -> None:
        """This gateway is gone: what it was sent and has not read is lost."""
        if number and (socket := self._sockets.pop(number, None)) is not None:
            socket.close(linger=0)

    def _put(self, number: int, data: bytes) -> None:
        if (socket := self._sockets.get(number)) is None:
            return
        try:
            socket.send(data)
        except zmq.Again:
            self.drop(number)
            self._put(0, encode(m.GatewayStuck(number)))

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close()
