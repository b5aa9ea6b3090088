# SPDX-License-Identifier: MIT
"""What a turn of a long session costs the gateway's CPU, part by part.

A session of about 100,000 tokens goes on with about 700 new ones. Every part is timed alone, as
the gateway runs it: CPU of this process and of the child that renders. `all to ids` is what
`Service.prompt` does in a thread. Template and tokenizer are the demo's, or a model folder's.

    python benchmarks/turns.py [--tokens 100000] [--new 700] [--tokenizer FOLDER] [--repeat 200]
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]

from tokenspeed.engine import messages as m
from tokenspeed.engine.wire import encode
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.gateway.app import check_depth
from tokenspeed.gateway.openai_schema import ChatRequest
from tokenspeed.gateway.openai_tools import chat_tools
from tokenspeed.models.hub import DEMO_FOLDER
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.history_keys import Spoken
from tokenspeed.text.history_tail import Tail
from tokenspeed.text.parsers import choose
from tokenspeed.text.prompt import Prompts
from tokenspeed.text.template_worker import TemplateWorker
from tokenspeed.text.tokenizer import Tokenizer

_WORDS = (
    "the file has an error in line so we must look at what it does when called with none".split()
)
NUM_TOOLS, TOOL_CHARS = 20, 2400  # 12,000 tokens of schemas, as coding agents bring


def text_of(rng: random.Random, num_chars: int) -> str:
    words = rng.choices(_WORDS, k=num_chars // 3)
    return " ".join(words)[:num_chars]


def tools(rng: random.Random) -> list[dict[str, Any]]:
    made = []
    for i in range(NUM_TOOLS):
        properties = {
            f"p{j}": {"type": "string", "description": text_of(rng, 80)} for j in range(8)
        }
        about = {
            "name": f"tool_{i}",
            "description": text_of(rng, TOOL_CHARS - 1000),
            "parameters": {"type": "object", "properties": properties},
        }
        made.append({"type": "function", "function": about})
    return made


def step(rng: random.Random, number: int, num_chars: int) -> list[dict[str, Any]]:
    """A call and its result."""
    arguments = json.dumps({"p0": f"src/file_{number}.py", "p1": text_of(rng, 200)})
    call = {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": f"tool_{number % NUM_TOOLS}", "arguments": arguments},
    }
    content = text_of(rng, num_chars - 300)
    return [
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": content},
    ]


def cpu_s(child: int) -> float:
    """CPU seconds of this process and of the one that renders, which the kernel counts in
    nanoseconds; its usual counters have ticks of 10 ms."""
    of_child = int(Path(f"/proc/{child}/schedstat").read_text().split()[0])
    return time.process_time() + of_child / 1e9


def timed(call: Callable[[], Any], child: int, repeat: int) -> float:
    """Mean microseconds of CPU, which other work on the machine does not lengthen."""
    call()
    begin = cpu_s(child)
    for _ in range(repeat):
        call()
    return round((cpu_s(child) - begin) / repeat * 1e6, 1)


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that the template writes after each turn."""
    text = tokenizer.special_tokens["eos_token"]
    return next(token for token, added in tokenizer.added_tokens.items() if added == text)


def session(
    prompts: Prompts, tokenizer: Tokenizer, body: dict[str, Any], args: argparse.Namespace
) -> None:
    """Fills `body["messages"]` with a session of which the last turn but one is known."""
    rng = random.Random(1)
    sample = text_of(rng, 40_000)
    chars = len(sample) / len(tokenizer.encode(sample, add_special_tokens=False))
    step_chars = round(args.new * chars)
    messages = body["messages"]
    used, number = len(json.dumps(body)), 0
    while used < (args.tokens - args.new) * chars:
        messages += step(rng, number, step_chars)
        used += step_chars
        number += 1
    answer = messages[-2]
    conversation = Conversation(messages[:-2], chat_tools(body["tools"]))
    prompt = prompts.make(conversation)
    call = answer["tool_calls"][0]
    function = call["function"]
    said = f'I look.<tool_call>{{"name": "{function["name"]}", "arguments": '
    said += f"{function['arguments']}}}</tool_call>"
    output = [*tokenizer.encode(said, add_special_tokens=False), end_of_turn(tokenizer)]
    spoken = Spoken(("I look.",), ((function["name"], call["id"], function["arguments"]),))
    prompts.record(prompt, spoken, output, output[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--new", type=int, default=700)
    parser.add_argument("--tokenizer", default=str(DEMO_FOLDER))
    parser.add_argument("--template", default=None)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--output", default=None, help="a JSON line is added to this file")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_folder(args.tokenizer)
    template = ChatTemplate.from_folder(
        Path(args.tokenizer), tokenizer.special_tokens, args.template
    )
    answers = choose("".join(template.sources.values()))
    worker = TemplateWorker(template)
    worker.start()
    prompts = Prompts(tokenizer, worker.render, answers)
    body: dict[str, Any] = {
        "model": "null",
        "messages": [
            {"role": "system", "content": text_of(random.Random(2), 8000)},
            {"role": "user", "content": "Please fix the tests."},
        ],
        "tools": tools(random.Random(3)),
    }
    session(prompts, tokenizer, body, args)
    try:
        result = measure(prompts, worker, template, tokenizer, body, args.repeat)
    finally:
        worker.close()
    for name, value in result.items():
        print(f"| {name} | {value} |")
    result["machine"] = f"{platform.machine()}, {psutil.cpu_count()} cores"
    line = json.dumps(result)
    print(line)
    if args.output:
        with Path(args.output).open("a") as file:
            file.write(line + "\n")


def measure(
    prompts: Prompts,
    worker: TemplateWorker,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    body: dict[str, Any],
    repeat: int,
) -> dict[str, Any]:
    """Microseconds of each part, and what the turn consists of."""
    data = msgspec.json.encode(body)
    decoder = msgspec.json.Decoder(ChatRequest)
    request = decoder.decode(data)
    conversation = Conversation(request.messages, chat_tools(request.tools))
    canonical = prompts.prepare()
    root = b"root"
    prompt = prompts.make(conversation)
    if prompt.origin is None or (known := prompt.origin.known) is None:
        raise SystemExit("the session is not continued: nothing to measure")
    at = len(conversation.messages) - 2
    tails = prompts._tails
    stop = tokenizer.added_tokens[end_of_turn(tokenizer)]
    tail = _found(tails.tail(conversation, at, stop))

    def check_depths() -> None:
        check_depth(request.messages, "messages")
        check_depth(request.tools, "tools")

    message = m.GenerateRequest(1, prompt.ids, SamplingParams(max_tokens=100))
    parts = {
        "decode body": lambda: decoder.decode(data),
        "check depth": check_depths,
        "tools to nouns": lambda: chat_tools(request.tools),
        "canonical form and hash of tools": lambda: canonical.apply(conversation),
        "hash messages": lambda: prompts._keys.chain(root, conversation.messages),
        "render and tokenise tail": lambda: prompts._tail_ids(
            _found(tails.tail(conversation, at, stop)), end_of_turn(tokenizer), stop
        ),
        "render tail, in a child": lambda: tails.tail(conversation, at, stop),
        "ids of the past": lambda: known.ids(),
        "tokenise tail": lambda: prompts._tail_ids(tail, end_of_turn(tokenizer), stop),
        "all to ids": lambda: prompts.make(conversation),
        "encode message": lambda: encode(message),
    }
    child = psutil.Process().children()[0].pid
    result: dict[str, Any] = {name: timed(call, child, repeat) for name, call in parts.items()}
    definitions = [tool.definition() for tool in conversation.tools]
    text = worker.render(conversation.messages, tools=definitions)
    slow = {
        "render": lambda: worker.render(conversation.messages, tools=definitions),
        "tokenise": lambda: tokenizer.encode(text, add_special_tokens=False),
    }
    for name, call in slow.items():
        result[f"without history: {name}"] = timed(call, child, 5)
    sizes = {"tokens": len(prompt.ids), "new": len(prompt.ids) - prompt.num_known}
    return sizes | {"messages": len(conversation.messages), "body bytes": len(data)} | result


def _found(tail: Tail | None) -> Tail:
    if tail is None:
        raise SystemExit("the template's turns cannot be told apart")
    return tail


if __name__ == "__main__":
    main()
