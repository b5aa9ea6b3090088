# SPDX-License-Identifier: MIT
"""`tokenspeed bench offline`: what `LLM` gives in this very process. Knows no HTTP and no sessions.

Time begins when the engine is built and has answered once.
"""

import argparse
import json
import time
from typing import TYPE_CHECKING

from tokenspeed.cli import bench_options
from tokenspeed.cli.options import add_engine_options, engine_options
from tokenspeed.config import EngineConfig

if TYPE_CHECKING:
    from tokenspeed.text.tokenizer import Tokenizer


def add(parser: argparse.ArgumentParser) -> None:
    add_engine_options(parser)
    box = parser.add_argument_group("offline")
    box.add_argument("--input-len", type=int, default=1024, metavar="N", help="tokens")
    box.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens")
    box.add_argument("--num-prompts", type=int, default=32, metavar="N", help="all at once")
    box.add_argument("--prompt-seed", type=int, default=0, metavar="N", help="of their words")


def run(args: argparse.Namespace) -> int:
    from tokenspeed.cli import bench_run

    bench_run.check_tools()
    from tokenspeed.bench.html import Table
    from tokenspeed.bench.report import text
    from tokenspeed.bench.workloads import fixed

    config = EngineConfig.of(**engine_options(args))
    lengths = {"input_tokens": args.input_len, "output_tokens": args.output_len}
    bench_options.check_least(1, num_prompts=args.num_prompts)
    bench_options.check_least(1, input_len=args.input_len, output_len=args.output_len)
    bench_options.check_least(0, prompt_seed=args.prompt_seed)
    workload = fixed.make(requests=args.num_prompts + 1, seed=args.prompt_seed, **lengths)
    from tokenspeed.bench.prompts import Prompts
    from tokenspeed.execution.sampling_params import SamplingParams
    from tokenspeed.llm import LLM

    words = Prompts(args.prompt_seed)
    texts = [words.text(session, 0) for session in workload.sessions]
    params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
    with LLM(config=config) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [{"prompt_token_ids": _cut(tokenizer, each, args.input_len)} for each in texts]
        llm.generate([prompts.pop()], SamplingParams(max_tokens=2), use_tqdm=False)
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=True)
        seconds = time.perf_counter() - begun
    prompt_tokens = sum(len(each.prompt_token_ids) for each in outputs)
    cached_tokens = sum(each.num_cached_tokens for each in outputs)
    output_tokens = sum(len(each.outputs[0].token_ids) for each in outputs)
    found = {
        "requests": len(outputs),
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "cached_prompt_tokens": cached_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": len(outputs) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / seconds,
    }
    rows = [(name.replace("_", " "), f"{value:,.6g}") for name, value in found.items()]
    print(text(Table("Offline", ("", config.model.model), rows)))
    print(json.dumps({"benchmark": "offline", "model": config.model.model, **found}))
    return 0


def _cut(tokenizer: "Tokenizer", text: str, length: int) -> list[int]:
    """Exactly `length` ids: the text again from its front where it falls short."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return (ids * -(-length // len(ids)))[:length]
