# SPDX-License-Identifier: MIT
"""A worker process seen from outside: asked, stopped while others are measured, weighed, ended.

Knows the protocol of `workers/worker_loop.py` and no engine. Linux only: it reads /proc.
"""

import base64
import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).resolve().parent / "workers"
KIB = 1024


class WorkerError(RuntimeError):
    """A worker ended, was too slow, or said that it cannot."""


@dataclass(frozen=True)
class Memory:
    """Of all processes of a worker, in bytes. What no other process maps counts as a whole."""

    pss: int
    anonymous: int
    mapped: int  # resident pages of files and shared memory: rss less anonymous


class Worker:
    """One engine in a process of its own; `start_s` is from the start to its first answer."""

    def __init__(
        self,
        name: str,
        command: list[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        timeout_s: float = 600,
    ) -> None:
        self.name, self._log = name, log
        begin = time.perf_counter()
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        try:
            self.versions: dict[str, str] = self._read(timeout_s)["ready"]
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - begin

    def generate(
        self, prompts: list[list[int]], num_tokens: int, timeout_s: float = 300
    ) -> list[list[float]]:
        """By stream, the seconds from the request to each of its tokens."""
        request = {"op": "generate", "prompts": prompts, "num_tokens": num_tokens}
        times: list[list[float]] = self._ask(request, timeout_s)["times"]
        return times

    def logits(self, prompt: list[int], timeout_s: float = 300) -> list[float]:
        """Logits or log-probabilities of the token after the prompt, by id."""
        answer = self._ask({"op": "logits", "prompt": prompt}, timeout_s)
        return array("f", base64.b64decode(answer["logits"])).tolist()

    def pause(self) -> None:
        """No thread of the worker runs until `resume`: idle pools of threads may spin."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def memory(self) -> Memory:
        """What the worker's processes hold now."""
        sums = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0)
        for pid in self._members():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                    key, value = line.split(":")
                    if key in sums:
                        sums[key] += int(value.split()[0]) * KIB
        return Memory(sums["Pss"], sums["Anonymous"], sums["Rss"] - sums["Anonymous"])

    def close(self) -> None:
        """Ends the worker and all processes of its session."""
        self.resume()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None:
            raise WorkerError("no pipe")
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except (OSError, ValueError) as error:  # the pipe is broken, or closed
            raise WorkerError(f"ended: {error}; see {self._log}") from error
        return self._read(timeout_s)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        if stdout is None:
            raise WorkerError("no pipe")
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise WorkerError(f"no answer within {timeout_s} s; see {self._log}")
        line = stdout.readline()
        if not line:
            raise WorkerError(f"ended; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{answer['error']}; see {self._log}")
        return answer

    def _members(self) -> list[int]:
        """The processes of the worker's session; its leader is the worker."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if os.getsid(int(entry.name)) == self._process.pid:
                        found.append(int(entry.name))
        return found

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
