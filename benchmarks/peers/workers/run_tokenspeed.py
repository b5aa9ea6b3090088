# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""TokenSpeed in this process, ids in and ids out."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker_loop import Times, serve, versions_of

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tokenspeed.config import EngineConfig
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.messages import GenerateRequest, TokenOutput
from tokenspeed.execution.sampling_params import SamplingParams

PAGE = 64


class TokenSpeed:
    """The engine of `LLM`, stepped here so that each token's time is seen."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(options["threads"])
        config = EngineConfig.of(
            model=options["model"],
            max_model_len=options["max_len"],
            num_pages=options["kv_tokens"] // PAGE,
            page_size=PAGE,
            skip_tokenizer_init=True,
            max_logprobs=options["vocab"],
            quantization=options["weights"],
            kv_cache_dtype=options.get("kv", "auto"),
            speculative_config='{"method": "off"}',  # random weights repeat themselves
        )
        self.versions = versions_of("tokenspeed", "torch")
        self._engine = build_engine(config)
        self._next = 1

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Times:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return [[at for at, _ in stream] for stream in self._run(prompts, params)]

    def logits(self, prompt: list[int]) -> Sequence[float]:
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=32768)
        [[(_, output)]] = self._run([prompt], params)
        if not output.logprobs:
            raise RuntimeError("no log-probabilities came back")
        entry = output.logprobs[0]
        found = dict(zip(entry.token_ids, entry.logprobs, strict=True))
        return [found[token] for token in range(len(found))]

    def _run(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> list[list[tuple[float, TokenOutput]]]:
        engine, first = self._engine, self._next
        self._next += len(prompts)
        for index, prompt in enumerate(prompts):
            engine.add_request(GenerateRequest(first + index, prompt, params))
        streams: list[list[tuple[float, TokenOutput]]] = [[] for _ in prompts]
        while engine.has_work():
            for output in engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error)
                now = time.perf_counter()
                streams[output.request_id - first] += [(now, output)] * len(output.token_ids)
        return streams


if __name__ == "__main__":
    serve(TokenSpeed)
