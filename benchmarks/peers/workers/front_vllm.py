# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""vLLM's own HTTP front end in front of an engine that computes nothing.

Runs in vLLM's environment (`peers/setup.py` makes one). What stands in for the engine is the client
of its process: the front end's server, validation, template, tokenizer, detokenizer, parsers and
statistics are vLLM's own; the messages to another process are left out, which favours it.

    ENVIRONMENT/bin/python front_vllm.py --model FOLDER --port N --answer FILE
        [--step-s S] [--max-model-len N]
"""

import argparse
import asyncio
import json
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1 import engine as e
from vllm.v1.engine.core_client import EngineCoreClient


class NullCore(EngineCoreClient):  # type: ignore[misc]
    """Answers `answer`, after as many of its words again as `max_tokens` has room for."""

    def __init__(self, answer: list[int], words: list[int], step_s: float) -> None:
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)
        self._answer, self._words, self._step_s = answer, words, step_s
        self._open: dict[str, list[int]] = {}  # ids still to be said, the last one first
        self._wake = asyncio.Event()
        self._due = 0.0

    async def add_request_async(self, request: Any) -> None:
        room = max(0, request.sampling_params.max_tokens - len(self._answer))
        filler = (self._words * (room // len(self._words) + 1))[:room]
        self._open[request.request_id] = [*filler, *self._answer][::-1]
        self._wake.set()

    async def get_output_async(self) -> Any:
        while not self._open:
            self._wake.clear()
            await self._wake.wait()
        await asyncio.sleep(max(0.0, self._due - time.monotonic()))
        self._due = max(self._due + self._step_s, time.monotonic() - self._step_s)
        outputs = []
        for name, ids in list(self._open.items()):
            token, over = ids.pop(), not ids
            reason = e.FinishReason.STOP if over else None
            outputs.append(e.EngineCoreOutput(name, [token], finish_reason=reason))
            if over:
                del self._open[name]
        return e.EngineCoreOutputs(outputs=outputs)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self._open.pop(name, None)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is none."""

    def dp_engines_running(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """There is nothing to end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", required=True)
    parser.add_argument("--answer", type=Path, required=True)
    parser.add_argument("--step-s", type=float, default=0.005)
    parser.add_argument("--max-model-len", type=int, default=262_144)
    args = parser.parse_args()
    said = json.loads(args.answer.read_text())

    def make(*_: Any, **__: Any) -> NullCore:
        return NullCore(said["answer"], said["words"], args.step_s)

    EngineCoreClient.make_async_mp_client = staticmethod(make)
    override = json.dumps({"max_position_embeddings": args.max_model_len})
    sys.argv = ["vllm", "--model", args.model, "--served-model-name", "null"]
    sys.argv += ["--host", "127.0.0.1", "--port", args.port, "--hf-overrides", override]
    sys.argv += ["--max-model-len", str(args.max_model_len), "--disable-uvicorn-access-log"]
    sys.argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
