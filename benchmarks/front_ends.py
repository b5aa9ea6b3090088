# SPDX-License-Identifier: MIT
"""CPU of a turn of a long session and of streamed events: this gateway's, and vLLM's front end's.

Both serve the demo's tokenizer and template, both have an engine that computes nothing and says the
same ids at the same pace. CPU is that of all threads of the server and of its children but the
engine. What it costs to be idle is measured and taken off.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import sessions

from tokenspeed.models.hub import DEMO_FOLDER
from tokenspeed.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MAX_MODEL_LEN = 262_144
WORDS = "I look at the file and at the line of the error. "
ARGUMENTS = '{"p0": "src/config/state.py", "p1": "the line of the error"}'
CALL = f'<tool_call>{{"name": "tool_3", "arguments": {ARGUMENTS}}}</tool_call>'
ANSWER_TOKENS = 60  # of a turn of a session
STREAMS, STREAM_TOKENS, RATE = 64, 300, 8000.0


def compare(turns: int, new: int, vllm: str | None, port: int) -> dict[str, Any]:
    """Rows for each server and dialect. `vllm`: the interpreter of an environment that has it."""
    said, chars = script()
    commands = {"tokenspeed": [sys.executable, "-m", "benchmarks.null_engine", "serve"]}
    if vllm:
        worker = ROOT / "benchmarks/peers/workers/front_vllm.py"
        commands["vllm"] = [vllm, str(worker), "--model", str(DEMO_FOLDER)]
    rows: list[dict[str, Any]] = []
    streams: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answer.json")
        file.write_text(json.dumps(said))
        for name in commands:
            with server(name, commands[name], file, 0.005, port) as pids:
                idle = _idle(pids)
                for dialect in sessions.DIALECTS:
                    one = sessions.drive(
                        port, dialect, pids, idle, chars, ANSWER_TOKENS, turns, new
                    )
                    rows.append({"server": name, **one})
            with server(name, commands[name], file, STREAMS / RATE, port) as pids:
                for dialect in sessions.DIALECTS:
                    streams.append({"server": name, **_streams(port, dialect, pids)})
    return {"chars_per_token": round(chars, 2), "sessions": rows, "streams": streams}


def script() -> tuple[dict[str, Any], float]:
    """What the engines say, see `null_engine.Echo`, and the characters of a token of a session."""
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    sample = sessions.text_of(random.Random(0), 40_000)
    chars = len(sample) / len(tokenizer.encode(sample, add_special_tokens=False))
    answer = tokenizer.encode(f"Now I look at the file.{CALL}", add_special_tokens=False)
    said = {
        "words": tokenizer.encode(WORDS, add_special_tokens=False),
        "answer": [*answer, tokenizer.inner.token_to_id(tokenizer.special_tokens["eos_token"])],
    }
    return said, chars


@contextmanager
def server(
    name: str, command: list[str], answer: Path, step_s: float, port: int
) -> Iterator[list[int]]:
    """A server that takes requests; the processes whose CPU counts."""
    options = ["--port", str(port), "--step-s", str(step_s), "--answer", str(answer)]
    options += ["--max-model-len", str(MAX_MODEL_LEN)]
    ready, variables = "/ready", dict(os.environ)
    if name == "vllm":
        ready = "/health"
        library = Path(command[0]).parent.parent / "lib" / "libiomp5.so"
        variables |= {"LD_PRELOAD": str(library)} if library.exists() else {}
    child = subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=variables,
    )
    try:
        _wait(f"http://127.0.0.1:{port}{ready}")
        children = psutil.Process(child.pid).children(recursive=True)
        counted = [p.pid for p in children if "benchmarks.null_engine" not in p.cmdline()]
        yield [child.pid, *counted]
    finally:
        child.terminate()
        child.wait(30)


def _wait(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer")


def _idle(pids: list[int]) -> float:
    """CPU seconds in a second in which nothing is asked."""
    before, begin = sessions.cpu_s(pids), time.monotonic()
    time.sleep(3.0)
    return (sessions.cpu_s(pids) - before) / (time.monotonic() - begin)


def _streams(port: int, dialect: str, pids: list[int]) -> dict[str, Any]:
    """Many short prompts at once, each answered with as many events as tokens."""
    session = sessions.Session(dialect, "Be brief.", [])
    session.ask("Say something.")
    body = session.body(STREAM_TOKENS)

    async def load() -> list[int]:
        path = sessions.DIALECTS[dialect]
        return await asyncio.gather(*(_count(port, path, body) for _ in range(STREAMS)))

    asyncio.run(load())  # warms up
    before, begin = sessions.cpu_s(pids), time.monotonic()
    events = sum(asyncio.run(load()))
    cpu, wall = sessions.cpu_s(pids) - before, time.monotonic() - begin
    return {
        "dialect": dialect,
        "streams": STREAMS,
        "tokens": STREAMS * STREAM_TOKENS,
        "events": events,
        "tokens_per_s": round(STREAMS * STREAM_TOKENS / wall),
        "cpu_s": round(cpu, 2),
        "events_per_cpu_s": round(events / cpu),
        "tokens_per_cpu_s": round(STREAMS * STREAM_TOKENS / cpu),
    }


async def _count(port: int, path: str, body: bytes) -> int:
    """Runs a stream; returns its number of events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"anthropic-version: 2023-06-01\r\nconnection: close\r\ncontent-length: {len(body)}"
    writer.write(f"{head}\r\n\r\n".encode() + body)
    whole = await reader.read()
    writer.close()
    if b" 200 " not in whole[:20]:
        raise RuntimeError(f"{whole[:500]!r}")
    return whole.count(b"data: ")
