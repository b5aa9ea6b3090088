# SPDX-License-Identifier: MIT
"""An engine process for tests, and the gateway's end of its sockets."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import zmq

from tokenspeed.config import EngineConfig
from tokenspeed.engine import messages as m
from tokenspeed.engine.wire import Decoder, encode, encode_config
from tokenspeed.execution.sampling_params import SamplingParams

WAIT_S = 60.0


class Peer:
    """The gateway's end of both sockets, and the process behind them."""

    def __init__(self, folder: Path | str, where: Path, *, wrap: str | None = None, **options: Any):
        inbox, self.outbox = f"ipc://{where}/in", f"ipc://{where}/out"
        self.context = zmq.Context()
        self.pull = self.context.socket(zmq.PULL)
        self.pull.bind(self.outbox)
        self.push = self.context.socket(zmq.PUSH)
        self.push.linger = 0
        self.push.connect(inbox)
        self.decoder = Decoder(m.Up)
        small = {"dtype": "float32", "page_size": 16, "num_pages": 64, "max_num_seqs": 8}
        config = EngineConfig.of(model=str(folder), **(small | options))
        command = [sys.executable, "-m", "tokenspeed.engine.server", "--config"]
        command += [encode_config(config), "--inbox", inbox, "--outbox", self.outbox]
        if wrap is not None:
            command = [sys.executable, "-c", wrap, *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self.push.send(message if isinstance(message, bytes) else encode(message))

    def receive(self, *kinds: type, timeout_s: float = WAIT_S) -> Any:
        """The next message of one of the kinds; others are passed over."""
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            if self.pull.poll(int(left * 1000) + 1):
                message = self.decoder.decode(self.pull.recv())
                if isinstance(message, kinds):
                    return message
        raise TimeoutError(f"no {kinds} within {timeout_s} s")

    def answer(self, request_id: int) -> list[m.TokenOutput]:
        found: list[m.TokenOutput] = []
        while not found or found[-1].finish_reason is None:
            found += [o for o in self.receive(m.Outputs).outputs if o.request_id == request_id]
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.context.destroy(linger=0)


def request(request_id: int, prompt: list[int], **params: Any) -> m.GenerateRequest:
    return m.GenerateRequest(request_id, prompt, SamplingParams(temperature=0.0, **params))
