# SPDX-License-Identifier: MIT
"""`tokenspeed generate`: prompts in, texts out, in one process. Knows flags, no sampling rules."""

import argparse
import json
import sys
from typing import Any

from tokenspeed.cli.options import add_engine_options, engine_options
from tokenspeed.config import EngineConfig


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("generate", help="complete prompts offline")
    add_engine_options(parser)
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--prompts-file", help="a file with one prompt a line; - is standard input")
    add_sampling_flags(parser, max_tokens=128)
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")
    parser.set_defaults(run=run, parser=parser)


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The sampling flags that `generate` and `chat` share."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P")
    group.add_argument("--top-k", type=int, default=0, metavar="K")
    group.add_argument("--stop", action="append", metavar="TEXT")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `SamplingParams` (and of the HTTP API) that were given."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "stop")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    config = EngineConfig.of(**engine_options(args))
    prompts = _prompts(args)
    from tokenspeed.execution.sampling_params import SamplingParams
    from tokenspeed.llm import LLM

    params = SamplingParams(**sampling_options(args))
    for output in LLM(config=config).generate(prompts, params):
        text = output.outputs[0].text
        if args.json:
            print(json.dumps({"prompt": output.prompt, "text": text}, ensure_ascii=False))
        else:
            print(f"{output.prompt}{text}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(args.prompt or ())
    if args.prompts_file == "-":
        prompts += sys.stdin.read().splitlines()
    elif args.prompts_file:
        with open(args.prompts_file, encoding="utf-8") as file:
            prompts += file.read().splitlines()
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE")
    return prompts
