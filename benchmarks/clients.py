# SPDX-License-Identifier: MIT
"""Real clients against `tokenspeed serve` with a model that says what a script tells it.

Installs pinned versions of Claude Code, Codex, mini-swe-agent, aider and the SDKs of OpenAI and
Anthropic, and gives each a task of two tools (write hello.py, run it, say what came out) on a
server of its own, in a network that has loopback alone. Checked: the file, the exit status, the
last answer, the number of turns, that from the second turn on the cache had all whole pages of what
went before, and that the server's log has nothing to complain about.

    pip install --no-deps ./examples/scripted-model
    python benchmarks/clients.py [--only NAME ...] [--out FILE] [--capture FOLDER]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_clients import network
from real_clients.golden import write_golden
from real_clients.lineup import CLIENTS, CUE, MODEL, Client, Place, environment
from real_clients.recorder import Recorder
from real_clients.report import Run, judge, summary, table, write
from real_clients.server import Server

TIMEOUT_S = 240


def main() -> int:
    options = _options()
    if network.is_alone():
        network.raise_loopback()
        return _run_all(options, alone=True)
    _install(options)
    wrapper = network.wrapper()
    if wrapper is None:
        print("unshare -rn is not permitted here: the clients run with the machine's network")
        return _run_all(options, alone=False)
    again = [sys.executable, __file__, *sys.argv[1:]]
    return subprocess.run([*wrapper, *again]).returncode


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path.home() / ".cache/tokenspeed/clients"
    parser.add_argument("--clients-dir", type=Path, default=default)
    parser.add_argument("--only", nargs="+", choices=sorted(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--out", type=Path, help="the figures as JSON, and as FILE.md")
    parser.add_argument("--capture", type=Path, help="folder for what each client sends")
    parser.add_argument("--show", action="store_true", help="what the clients print, too")
    return parser.parse_args()


def _install(options: argparse.Namespace) -> None:
    for package in dict.fromkeys(CLIENTS[name].package for name in options.only):
        try:
            package.install(options.clients_dir)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{package.name} {package.version} cannot be installed: {error}")


def _run_all(options: argparse.Namespace, *, alone: bool) -> int:
    runs: list[Run] = []
    for name in options.only:
        client = CLIENTS[name]
        version = client.package.found(options.clients_dir)
        if not version:
            print(f"{name} is left out: {client.package.name} is not installed")
            continue
        with tempfile.TemporaryDirectory(prefix="tokenspeed-clients-") as folder:
            runs.append(_run(client, version, Path(folder), options))
    print(table(runs))
    print(json.dumps(summary(runs, alone)))
    if options.out:
        write(options.out, runs, alone, "python benchmarks/clients.py")
    return any(run.trouble for run in runs) or not runs


def _run(client: Client, version: str, folder: Path, options: argparse.Namespace) -> Run:
    work, home = folder / "work", folder / "home"
    work.mkdir()
    home.mkdir()
    answers = client.answers(work)
    server = Server(folder, CUE, answers, MODEL)
    with server, Recorder(server.port) as recorder:
        port = recorder.port if options.capture else server.port
        clients = options.clients_dir.resolve()
        place = Place(f"http://127.0.0.1:{port}", work, home, clients)
        status, said = _start(client, place)
    if options.show:
        print(said)
    if options.capture:
        about: dict[str, Any] = {
            "client": client.name,
            "version": version,
            "dialect": client.dialect,
        }
        about |= {"linear": client.linear, "answers": answers[: client.num_turns]}
        paths = {str(work): "/project", str(home): "/home/user", str(clients): "/clients"}
        file = options.capture / f"{client.name}.json"
        write_golden(file, about, recorder.exchanges, paths)
    run = judge(client, version, status, said, work, server)
    shutil.rmtree(home, ignore_errors=True)
    return run


def _start(client: Client, place: Place) -> tuple[int, str]:
    """Its exit status (124: it took too long) and all that it printed."""
    try:
        done = subprocess.run(
            client.command(place),
            cwd=place.work,
            env=environment(client, place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as late:
        return 124, (late.output or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


if __name__ == "__main__":
    raise SystemExit(main())
