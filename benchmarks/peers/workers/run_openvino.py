# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""OpenVINO GenAI: its continuous-batching pipeline with prefix caching, ids in and ids out.

The pipeline hands out no logits; those come from the same model compiled without paging, with the
same hints, which is loaded when they are first asked for.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from worker_loop import Times, serve, versions_of

BLOCK = 32  # tokens in a block of its KV cache on CPUs
STREAMS = 8
KV_TYPES = {"bf16": openvino.Type.bf16, "u8": openvino.Type.u8}


class OpenVino:
    """A pipeline that is stepped here, so that each token's time is seen."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.versions = versions_of("openvino", "openvino-genai")
        self._folder = options["model"]
        self._hints: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": options["threads"],
            "INFERENCE_PRECISION_HINT": openvino.Type.bf16,
            "KV_CACHE_PRECISION": KV_TYPES[options.get("kv", "bf16")],
            "PERFORMANCE_HINT": "LATENCY",
        } | options.get("extra", {})
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = options["kv_tokens"] // BLOCK
        scheduler.max_num_batched_tokens = options.get("batch_tokens", 4608)
        scheduler.max_num_seqs = STREAMS
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = options.get("split_fuse", True)
        self._pipeline = genai.ContinuousBatchingPipeline(
            self._folder, scheduler, "CPU", self._hints
        )
        self._compiled: Any = None
        self._next = 0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Times:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos, config.do_sample = True, False
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], np.int64))
            handles.append(self._pipeline.add_request(self._next, ids, config))
            self._next += 1
        times: Times = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for stream, handle in zip(times, handles, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        stream += [now] * len(output.generated_ids)
        return times

    def logits(self, prompt: list[int]) -> Sequence[float]:
        if self._compiled is None:
            path = Path(self._folder) / "openvino_model.xml"
            self._compiled = openvino.Core().compile_model(path, "CPU", self._hints)
        request = self._compiled.create_infer_request()
        length = len(prompt)
        inputs = {
            "input_ids": np.array([prompt], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        known = {name for port in self._compiled.inputs for name in port.names}
        found = request.infer({k: v for k, v in inputs.items() if k in known})
        return [float(value) for value in found["logits"][0, -1]]


if __name__ == "__main__":
    serve(OpenVino)
