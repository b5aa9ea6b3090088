# SPDX-License-Identifier: MIT
"""The loop of a worker: JSON lines in on stdin, JSON lines out on what was stdout. No engine here.

    -> {"op": "generate", "prompts": [[1, 2, ...], ...], "num_tokens": 65}
    <- {"times": [[seconds from the request to each token], ...]}
    -> {"op": "logits", "prompt": [1, 2, ...]}
    <- {"logits": base64 of float32, in the order of ids}

The first line out is {"ready": versions}. What fails is answered {"error": why}; end of file ends
the worker. Needs the standard library only, since it runs in every peer's environment.
"""

import base64
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

PR_SET_PDEATHSIG = 1
Times = list[list[float]]  # by stream: perf_counter at each token


class Engine(Protocol):
    """What a worker must offer. Greedy; an end-of-sequence token ends nothing."""

    versions: dict[str, str]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Times:
        """Runs all prompts at once until each has `num_tokens` tokens."""

    def logits(self, prompt: list[int]) -> Sequence[float]:
        """Logits, or log-probabilities, of the token after the prompt, for the whole vocabulary."""


def serve(build: Callable[[dict[str, Any]], Engine]) -> None:
    """Builds the engine from the JSON object in the first argument, then answers until EOF."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped worker sees no EOF
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print to stdout as they like

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        engine = build(json.loads(sys.argv[1]))
    except BaseException as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
    answer({"ready": engine.versions})
    for line in sys.stdin:
        try:
            answer(handle(engine, json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


def handle(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """One answer. `ValueError` for an operation that is unknown or an answer that is short."""
    if request["op"] == "generate":
        begin = time.perf_counter()
        times = engine.generate(request["prompts"], request["num_tokens"])
        counts = [len(stream) for stream in times]
        if counts != [request["num_tokens"]] * len(request["prompts"]):
            raise ValueError(f"asked for {request['num_tokens']} tokens each, got {counts}")
        return {"times": [[round(at - begin, 6) for at in stream] for stream in times]}
    if request["op"] == "logits":
        found = array("f", engine.logits(request["prompt"]))
        return {"logits": base64.b64encode(found.tobytes()).decode()}
    raise ValueError(f"unknown operation {request['op']!r}")


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
