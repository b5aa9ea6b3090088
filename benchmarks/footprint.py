# SPDX-License-Identifier: MIT
"""Which of our files one streamed chat request touches, and how many lines they have.

Starts the real server with the demo model, warms it up, then records in both processes every
Python file of ours in which a function is called between the request and its last byte. C++ files
cannot be traced that way: all sources that the two extension modules are built from are counted
when the request calls into the module. Knows processes and files, nothing of what they do.

    python benchmarks/footprint.py [--model demo]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TRACER = """
import os, sys, threading
PACKAGE, FLAG, LOG = {package!r}, {flag!r}, {log!r}
SEEN = set()
def trace(frame, event, arg):
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(PACKAGE) and name not in SEEN and os.path.exists(FLAG):
        SEEN.add(name)
        with open(LOG, "a") as log:
            log.write(name + "\\n")
threading.setprofile(trace)
sys.setprofile(trace)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(url: str, server: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server left with {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/ready"):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"not ready within {timeout_s} s")


def chat(url: str) -> int:
    """One streamed chat request; returns the number of events."""
    body = {
        "messages": [{"role": "user", "content": "Write a function that adds two numbers."}],
        "stream": True,
        "max_tokens": 16,
        "temperature": 0.7,
    }
    call = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call) as response:
        return sum(line.startswith(b"data: ") for line in response)


def touched(model: str) -> list[Path]:
    """The Python files of ours that one request runs through, gateway and engine."""
    with tempfile.TemporaryDirectory() as folder:
        flag, log = Path(folder, "flag"), Path(folder, "log")
        code = TRACER.format(package=str(ROOT / "tokenspeed"), flag=str(flag), log=str(log))
        Path(folder, "sitecustomize.py").write_text(code)
        port = free_port()
        paths = os.pathsep.join([folder, str(ROOT)])
        server = subprocess.Popen(
            [sys.executable, "-m", "tokenspeed", "serve", model, "--port", str(port)],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(url, server)
            chat(url)
            flag.touch()
            chat(url)
            flag.unlink()
        finally:
            server.terminate()
            server.wait(30)
        return sorted({Path(line) for line in log.read_text().splitlines()})


def compiled_sources() -> list[Path]:
    """What the extension modules are built from, their bindings included; nothing for GPUs."""
    names = ("scheduler", "policy", "drafts", "cpu", "shm", "bindings")
    folders = [ROOT / "csrc" / name for name in names]
    return sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".h", ".cpp"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    args = parser.parse_args()
    groups = {"python": touched(args.model), "c++": compiled_sources()}
    result: dict[str, int] = {}
    for group, paths in groups.items():
        for path in paths:
            lines = len(path.read_text().splitlines())
            print(f"{group:<7} {lines:>5}  {path.relative_to(ROOT)}")
            result[f"{group}_lines"] = result.get(f"{group}_lines", 0) + lines
        result[f"{group}_files"] = len(paths)
    print(json.dumps({"benchmark": "footprint", **result}))


if __name__ == "__main__":
    main()
