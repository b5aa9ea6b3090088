# SPDX-License-Identifier: MIT
"""A server with a scripted model for one client, and what its log says of each request.

Knows no client.
"""

import http.client
import json
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PAGE_SIZE = 64
READY_S = 120
_LINE = "tokenspeed.requests: "
_TROUBLE = ("ERROR", "CRITICAL", "Traceback", "WARNING")


class Server:
    """`with Server(folder, answers, ...)`: runs within; `turns` and `trouble` after it."""

    def __init__(self, folder: Path, cue: str, answers: list[str], name: str) -> None:
        self._log, self.port = folder / "server.log", free_port()
        plays = {"plays": [{"cue": cue, "answers": answers}], "other": "I have no line here."}
        (folder / "plays.json").write_text(json.dumps(plays))
        model = str(folder / "model")
        make = ["tokenspeed_scripted_folder", str(folder / "plays.json"), model]
        subprocess.run([sys.executable, "-m", *make], check=True)
        options = {
            "--port": self.port,
            "--served-model-name": name,
            "--max-model-len": 200_000,
            "--num-pages": 6000,
            "--page-size": PAGE_SIZE,
        }
        given = [str(part) for pair in options.items() for part in pair]
        flags = ["--enforce-eager", "--log-requests", *given]
        self._command = [sys.executable, "-m", "tokenspeed", "serve", model, *flags]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + READY_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(f"the server did not become ready: {self._log.read_text()}")
            time.sleep(0.2)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(60)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The fields of each request's line in the log."""
        lines = self._log.read_text().splitlines()
        found = [line.partition(_LINE)[2] for line in lines if _LINE in line]
        return [dict(p.split("=", 1) for p in shlex.split(one) if "=" in p) for one in found]

    @property
    def trouble(self) -> list[str]:
        """What the server has complained about."""
        return [n for n in self._log.read_text().splitlines() if n.startswith(_TROUBLE)]

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
