# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""llama.cpp through the low-level calls of its Python binding, as its own server drives it.

Flash attention where it takes the model, KV in 16 bits unless told otherwise, one KV buffer for all
streams. The cache of stream 0 stays, so that a prompt that begins like the last one is not read
twice. The next token is NumPy's argmax of the logits.
"""

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from worker_loop import Times, serve, versions_of

STREAMS = 8
KV_TYPES = {"f16": "GGML_TYPE_F16", "bf16": "GGML_TYPE_BF16", "q8_0": "GGML_TYPE_Q8_0"}


class Llama:
    """A context for eight streams."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.versions = versions_of("llama-cpp-python")
        self._vocab, self._micro = options["vocab"], options.get("ubatch", 512)
        llama.llama_backend_init()
        model = llama.llama_model_default_params()
        model.use_mmap = options.get("mmap", True)
        model.use_extra_bufts = True
        self._model = llama.llama_model_load_from_file(options["model"].encode(), model)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {options['model']}")
        params = llama.llama_context_default_params()
        params.n_ctx = options["kv_tokens"]
        params.n_batch = params.n_ubatch = self._micro
        params.n_seq_max = STREAMS
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = options["threads"]
        params.flash_attn_type = options.get("flash_attention", -1)  # -1: where it is possible
        params.type_k = params.type_v = getattr(llama, KV_TYPES[options.get("kv", "f16")])
        params.no_perf = True
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context for this model")
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(self._micro, 0, 1)
        self._kept: list[int] = []  # tokens of stream 0 in the cache

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Times:
        """Prompts are read one after the other, then all streams decode in one batch."""
        times: Times = [[] for _ in prompts]
        last = []
        for stream, prompt in enumerate(prompts):
            last.append(int(self._prefill(stream, prompt).argmax()))
            times[stream].append(time.perf_counter())
        for step in range(num_tokens - 1):
            tokens = [(t, len(prompts[s]) + step, s, True) for s, t in enumerate(last)]
            self._decode(tokens)
            last = [int(self._row(i).argmax()) for i in range(len(tokens))]
            now = time.perf_counter()
            for stream in times:
                stream.append(now)
        llama.llama_memory_seq_rm(self._memory, 0, len(prompts[0]), -1)
        for stream in range(1, len(prompts)):
            llama.llama_memory_seq_rm(self._memory, stream, -1, -1)
        return times

    def logits(self, prompt: list[int]) -> Sequence[float]:
        return [float(value) for value in self._prefill(0, prompt)]

    def _prefill(self, stream: int, prompt: list[int]) -> np.ndarray:
        """Logits after the prompt. Takes from the cache what it shares with the last one."""
        same = 0
        if stream == 0:
            limit = min(len(self._kept), len(prompt) - 1)
            while same < limit and self._kept[same] == prompt[same]:
                same += 1
            llama.llama_memory_seq_rm(self._memory, 0, same, -1)
            self._kept = prompt
        for begin in range(same, len(prompt), self._micro):
            piece = range(begin, min(begin + self._micro, len(prompt)))
            self._decode([(prompt[at], at, stream, at == len(prompt) - 1) for at in piece])
        return self._row(len(piece) - 1)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, stream, whether logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, stream, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        if status := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _row(self, index: int) -> np.ndarray:
        pointer = llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocab,)
        )


if __name__ == "__main__":
    serve(Llama)
