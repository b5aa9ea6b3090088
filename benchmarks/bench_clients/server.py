# SPDX-License-Identifier: MIT
"""A server for benchmark clients, and what its log says of each request. Knows no client."""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

READY_S = 180.0
LINE = "tokenspeed.requests: "


@contextmanager
def served(arguments: list[str], port: int, log: Path) -> Iterator[str]:
    """The URL of `python -m ARGUMENTS --port PORT`, ready. `RuntimeError`: it did not get so."""
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    with running(command, f"http://127.0.0.1:{port}", "/ready", log) as url:
        yield url


@contextmanager
def running(command: list[str], url: str, ready: str, log: Path) -> Iterator[str]:
    """The URL of a server that has answered 200 at its path `ready`. `RuntimeError`: it did not."""
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            _wait(process, url + ready, log)
            yield url
        finally:
            process.terminate()


def requests_since(log: Path, start: int) -> list[dict[str, str]]:
    """The fields of each request's line behind so many bytes of the log."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    found = (line.partition(LINE)[2] for line in lines if LINE in line)
    return [dict(p.split("=", 1) for p in shlex.split(one) if "=" in p) for one in found]


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, trust_env=False, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not become ready: {log.read_text()[-2000:]}")
