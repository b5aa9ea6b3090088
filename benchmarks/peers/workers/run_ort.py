# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""onnxruntime-genai: one generator for a batch, ids in and ids out.

The generator of the last single prompt stays, rewound, so that a prompt that begins like the last
one is not read twice.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from worker_loop import Times, serve, versions_of


class OrtGenai:
    """A model and its generators."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.versions = versions_of("onnxruntime-genai", "onnxruntime")
        self._max_len = options["max_len"]
        config = genai.Config(options["model"])
        threads = {"intra_op_num_threads": options["threads"], "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = genai.Model(config)
        self._kept: tuple[list[int], Any] | None = None

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Times:
        longest = max(len(prompt) for prompt in prompts)
        if len(prompts) == 1:
            generator = self._continued(prompts[0])
        else:
            self._kept = None
            generator = self._generator(len(prompts), longest + num_tokens)
            generator.append_tokens(np.array(prompts, np.int32))
        times: list[float] = []
        for _ in range(num_tokens):
            generator.generate_next_token()
            times.append(time.perf_counter())
        if len(prompts) == 1:
            self._kept = (prompts[0], generator)
        return [list(times) for _ in prompts]

    def logits(self, prompt: list[int]) -> Sequence[float]:
        self._kept = None
        generator = self._generator(1, len(prompt) + 1)
        generator.append_tokens(np.array([prompt], np.int32))
        return [float(value) for value in generator.get_logits().reshape(-1)]

    def _continued(self, prompt: list[int]) -> Any:
        """A generator that has read the prompt, from what the last one holds if it begins so."""
        if self._kept is not None:
            known, generator = self._kept
            if len(prompt) > len(known) and prompt[: len(known)] == known:
                generator.rewind_to(len(known))
                generator.append_tokens(np.array([prompt[len(known) :]], np.int32))
                return generator
        self._kept = None
        generator = self._generator(1, self._max_len)
        generator.append_tokens(np.array([prompt], np.int32))
        return generator

    def _generator(self, batch: int, max_len: int) -> Any:
        params = genai.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, batch_size=batch, max_length=max_len, min_length=max_len
        )
        return genai.Generator(self._model, params)


if __name__ == "__main__":
    serve(OrtGenai)
