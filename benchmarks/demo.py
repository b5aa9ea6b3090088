# SPDX-License-Identifier: MIT
"""How fast the bundled model answers, side by side with transformers' `generate` in one run.

Time to the first token is the time of one token. Tokens per second are those after the first: the
time of `--tokens` + 1 tokens less the time of one, all streams together. Both engines see the same
random prompts in the same dtype; runs are interleaved and medians of the times are taken, so that
the ratio holds on a machine that is not quiet. Prefix caching is off.

    python benchmarks/demo.py [--prompt 256] [--tokens 128] [--repeat 5] [--threads N]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tokenspeed import LLM, SamplingParams
from tokenspeed.models.hub import resolve_model

Generate = Callable[[list[list[int]], int], int]  # prompts, tokens each -> tokens generated
BATCHES = (1, 8)


def ours(model: str, dtype: str, longest: int) -> Generate:
    """The engine in this process, ids in and ids out."""
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=longest,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        speculative_config='{"method": "off"}',
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def transformers(model: str, dtype: str, longest: int) -> Generate:
    """The same checkpoint in transformers, with its default attention."""
    log: Any = logging
    log.set_verbosity_error()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        resolve_model(model), dtype=getattr(torch, dtype)
    )
    loaded.eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
        return int(out[:, ids.shape[1] :].numel())

    return generate


def measure(generate: Generate, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds until every prompt has its `num_tokens` tokens."""
    begin = time.perf_counter()
    count = generate(prompts, num_tokens)
    if count != len(prompts) * num_tokens:
        raise RuntimeError(f"{count} tokens came back")
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated after the first")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    longest = args.prompt + args.tokens + 1
    engines = {
        "tokenspeed": ours(args.model, args.dtype, longest),
        "transformers": transformers(args.model, args.dtype, longest),
    }
    results: dict[str, Any] = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in ("model", "dtype", "prompt", "tokens")},
    }
    print(f"{'batch':>5} {'engine':<14} {'TTFT ms':>9} {'tokens/s':>9}")
    for batch in BATCHES:
        results[f"batch_{batch}"] = compare(engines, batch, args)
    print(json.dumps(results))


def compare(engines: dict[str, Generate], batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Medians of interleaved runs of both engines at one batch size, and their ratios."""
    torch.manual_seed(batch)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for repeat in range(args.repeat + 1):
        prompts = torch.randint(10, 4000, (batch, args.prompt)).tolist()
        for name, generate in engines.items():
            pair = (measure(generate, prompts, 1), measure(generate, prompts, args.tokens + 1))
            if repeat:  # the first warms up
                found[name].append(pair)
    row: dict[str, float] = {}
    for name, runs in found.items():
        first, whole = (statistics.median(column) for column in zip(*runs, strict=True))
        rate = batch * args.tokens / (whole - first)
        row |= {f"{name}_ttft_ms": round(first * 1e3, 2), f"{name}_tokens_s": round(rate, 1)}
        print(f"{batch:>5} {name:<14} {first * 1e3:>9.1f} {rate:>9.1f}")
    row["ttft_ratio"] = round(row["transformers_ttft_ms"] / row["tokenspeed_ttft_ms"], 2)
    row["tokens_ratio"] = round(row["tokenspeed_tokens_s"] / row["transformers_tokens_s"], 2)
    print(f"{'':>5} {'ratio':<14} {row['ttft_ratio']:>9.2f} {row['tokens_ratio']:>9.2f}")
    return row


if __name__ == "__main__":
    main()
