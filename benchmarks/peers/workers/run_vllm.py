# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""vLLM's CPU wheel, offline: its engine in this process, compiled, with prefix caching."""

import importlib
import os
import time
from collections.abc import Sequence
from typing import Any

from worker_loop import Times, serve, versions_of

STREAMS = 8


class Vllm:
    """`LLM` with token ids in, stepped here so that each token's time is seen."""

    def __init__(self, options: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options['threads'] - 1}")
        self._vllm = importlib.import_module("vllm")
        self._vocab = options["vocab"]
        self._llm = self._vllm.LLM(
            model=options["model"],
            dtype="bfloat16",
            max_model_len=options["max_len"],
            max_num_seqs=STREAMS,
            kv_cache_memory_bytes=options["kv_bytes"],
            enable_prefix_caching=True,
            max_logprobs=options["vocab"],
            disable_log_stats=True,
            **options.get("extra", {}),
        )
        self.versions = versions_of("vllm-cpu", "vllm", "torch", "zentorch")
        self._next = 0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Times:
        params = self._params(num_tokens)
        engine = self._llm.llm_engine
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            times[str(self._next)] = []
            engine.add_request(str(self._next), {"prompt_token_ids": prompt}, params)
            self._next += 1
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                stream = times[output.request_id]
                stream += [now] * (len(output.outputs[0].token_ids) - len(stream))
        return list(times.values())

    def logits(self, prompt: list[int]) -> Sequence[float]:
        """Log-probabilities: vLLM hands out no logits."""
        params = self._params(1, logprobs=self._vocab)
        [output] = self._llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        found = output.outputs[0].logprobs[0]
        return [found[token].logprob for token in range(self._vocab)]

    def _params(self, num_tokens: int, **more: Any) -> Any:
        return self._vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **more
        )


if __name__ == "__main__":
    serve(Vllm)
