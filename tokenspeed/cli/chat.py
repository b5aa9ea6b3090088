# SPDX-License-Identifier: MIT
"""`tokenspeed chat`: a streaming terminal chat, against a server or in process. Knows no tokens."""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib import error, request

from tokenspeed.cli.generate import add_sampling_flags, sampling_options
from tokenspeed.cli.options import add_engine_options, engine_options
from tokenspeed.config import EngineConfig
from tokenspeed.errors import TokenSpeedError

Message = dict[str, str]
Answer = Callable[[list[Message]], Iterator[str]]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="talk to a model in the terminal")
    add_engine_options(parser)
    parser.add_argument("--url", help="a server such as http://127.0.0.1:8000; none: in process")
    parser.add_argument("--api-key", help="the key that the server asks for")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--message", help="ask this one thing and leave")
    add_sampling_flags(parser, max_tokens=512)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    config = EngineConfig.of(**engine_options(args))
    answer = over_http(args) if args.url else in_process(args, config)
    messages: list[Message] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    if args.message:
        take_turn(messages, args.message, answer)
        return 0
    print("Type a message; an empty line or Ctrl-D leaves.")
    while text := _ask():
        take_turn(messages, text, answer)
    return 0


def _ask() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def take_turn(messages: list[Message], text: str, answer: Answer) -> None:
    """Prints the answer piece by piece and keeps both turns in `messages`."""
    messages.append({"role": "user", "content": text})
    pieces = []
    for piece in answer(messages):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    messages.append({"role": "assistant", "content": "".join(pieces)})


def over_http(args: argparse.Namespace) -> Answer:
    """Answers from a server's /v1/chat/completions, as a stream of server-sent events."""
    headers = {"Content-Type": "application/json"}
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"

    def answer(messages: list[Message]) -> Iterator[str]:
        body = {"messages": messages, "stream": True, **sampling_options(args)}
        if "model" in vars(args):
            body["model"] = args.model
        url = args.url.rstrip("/") + "/v1/chat/completions"
        call = request.Request(url, json.dumps(body).encode(), headers)
        try:
            with request.urlopen(call) as response:
                yield from _deltas(response)
        except error.HTTPError as failure:
            raise TokenSpeedError(f"{url}: {failure.code} {failure.read().decode()}") from None
        except error.URLError as failure:
            raise TokenSpeedError(f"{url}: {failure.reason}; is the server running?") from None

    return answer


def _deltas(lines: Any) -> Iterator[str]:
    for line in lines:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            return
        if not data or data.startswith(":"):
            continue
        event = json.loads(data)
        if "error" in event:
            raise TokenSpeedError(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""
    raise TokenSpeedError("the server ended the connection before the answer was whole")


def in_process(args: argparse.Namespace, config: EngineConfig) -> Answer:
    """Answers from an engine inside this process."""
    from tokenspeed.execution.sampling_params import SamplingParams
    from tokenspeed.llm import LLM

    params = SamplingParams(**sampling_options(args))  # refused before any weight is read
    llm = LLM(config=config)
    return lambda messages: llm.stream_chat(messages, params)
