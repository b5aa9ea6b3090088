# SPDX-License-Identifier: MIT
"""A coding agent's session as its client holds it, in three dialects, with the sizes of a real one.

Grows turn by turn: the answer is put back as the client got it, and a tool's result follows. Sizes
in tokens are those of a recorded session (`TOKENSPEED_TRACES`) or grow evenly. The text is made up,
and looks like code. Knows no server's insides.
"""

import gzip
import http.client
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenspeed.bench.workloads.traces import file_in
from tokenspeed.config import traces_place

TRACE = "trace_0017"  # of 15,161 tokens in its first request and 101,144 in its 28th
DIALECTS = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
NUM_TOOLS = 20

_NAMES = "file line index value error result path name state config count buffer node".split()
_LINES = (
    "    if {a} is None:",
    "        return self.{b}({a}, {c})",
    "    for {a} in range(len({b})):",
    '        raise ValueError("the {a} of {b} must not be empty")',
    "    {a} = {b}.get({c}) or [] # what it was before",
    "src/{a}/{b}.py: the {c} is not what the tests say it should be",
)

Json = dict[str, Any]


def sizes() -> tuple[list[int], str]:
    """Prompt tokens of each request, and where they come from."""
    try:
        file = file_in(traces_place())
    except ValueError as error:
        print(f"sizes grow evenly; {error}", file=sys.stderr)
        return [15_000 + 3100 * i for i in range(29)], "even growth"
    with gzip.open(file, "rt") as lines:
        found = next(s for s in map(json.loads, lines) if s["id"] == TRACE)
    grown = [request[1] for request in found["requests"] if isinstance(request, list)]
    end = next(i for i, size in enumerate(grown) if size >= 100_000)
    return grown[: end + 1], TRACE


def text_of(rng: random.Random, num_chars: int) -> str:
    lines, used = [], 0
    while used < num_chars:
        a, b, c = rng.choices(_NAMES, k=3)
        lines.append(rng.choice(_LINES).format(a=a, b=b, c=c))
        used += len(lines[-1]) + 1
    return "\n".join(lines)[:num_chars]


def schemas(rng: random.Random, num_chars: int) -> list[tuple[str, str, Json]]:
    """Name, description and schema of each tool, `num_chars` in all."""
    each = num_chars // NUM_TOOLS
    made = []
    for i in range(NUM_TOOLS):
        about = {f"p{j}": {"type": "string", "description": text_of(rng, 80)} for j in range(6)}
        schema = {"type": "object", "properties": about, "required": ["p0"]}
        rest = max(20, each - len(json.dumps(schema)))
        made.append((f"tool_{i}", text_of(rng, rest), schema))
    return made


@dataclass
class Answer:
    """What the client got, and when its first event came."""

    items: list[Json]  # of the dialect's own shape, as they go back
    call_id: str
    usage: Json
    num_events: int


@dataclass
class Session:
    """One conversation; `body` is the next request."""

    dialect: str
    system: str
    tools: list[tuple[str, str, Json]]
    items: list[Json] = field(default_factory=list)

    def ask(self, text: str) -> None:
        self.items.append(_user(self.dialect, text))

    def go_on(self, answer: Answer, result: str) -> None:
        """The client puts back what was said, and what the tool has found."""
        self.items += answer.items
        self.items.append(_result(self.dialect, answer.call_id, result))

    def body(self, max_tokens: int) -> bytes:
        head: Json = {"model": "null", "stream": True}
        tools = [_tool(self.dialect, *tool) for tool in self.tools]
        if tools:
            head["tools"] = tools
        match self.dialect:
            case "chat":
                head |= {"max_tokens": max_tokens, "stream_options": {"include_usage": True}}
                first = {"role": "system", "content": self.system}
                return json.dumps(head | {"messages": [first, *self.items]}).encode()
            case "messages":
                system = [{"type": "text", "text": self.system}]
                head |= {"max_tokens": max_tokens, "system": system}
                return json.dumps(head | {"messages": self.items}).encode()
            case _:
                head |= {"max_output_tokens": max_tokens, "store": False}
                head |= {"instructions": self.system}
                return json.dumps(head | {"input": self.items}).encode()


def _tool(dialect: str, name: str, about: str, schema: Json) -> Json:
    if dialect == "messages":
        return {"name": name, "description": about, "input_schema": schema}
    function = {"name": name, "description": about, "parameters": schema}
    if dialect == "responses":
        return {"type": "function", **function}
    return {"type": "function", "function": function}


def _user(dialect: str, text: str) -> Json:
    if dialect == "responses":
        content = [{"type": "input_text", "text": text}]
        return {"type": "message", "role": "user", "content": content}
    return {"role": "user", "content": text}


def _result(dialect: str, call_id: str, text: str) -> Json:
    if dialect == "chat":
        return {"role": "tool", "tool_call_id": call_id, "content": text}
    if dialect == "messages":
        block = {"type": "tool_result", "tool_use_id": call_id, "content": text}
        return {"role": "user", "content": [block]}
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def post(port: int, dialect: str, body: bytes, first: Callable[[], None] = lambda: None) -> Answer:
    """One request on a connection of its own; `first` is called at the first event."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    kind = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
    connection.request("POST", DIALECTS[dialect], body, kind)
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {reply.read()[:500]!r}")
    events: list[Json] = []
    for line in reply:
        if not line.startswith(b"data: "):
            continue
        if not events:
            first()
        if line.strip() != b"data: [DONE]":
            events.append(json.loads(line[6:]))
    connection.close()
    return {"chat": _of_chat, "messages": _of_messages, "responses": _of_responses}[dialect](events)


def _of_chat(events: list[Json]) -> Answer:
    text, call = "", {"id": "", "name": "", "arguments": ""}
    usage: Json = {}
    for event in events:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            delta = choice["delta"]
            text += delta.get("content") or ""
            for part in delta.get("tool_calls") or ():
                call["id"] += part.get("id") or ""
                for key in ("name", "arguments"):
                    call[key] += part["function"].get(key) or ""
    function = {"name": call["name"], "arguments": call["arguments"]}
    calls = [{"id": call["id"], "type": "function", "function": function}]
    message = {"role": "assistant", "content": text, "tool_calls": calls}
    return Answer([message], call["id"], usage, len(events))


def _of_messages(events: list[Json]) -> Answer:
    blocks: list[Json] = []
    usage: Json = {}
    given = ""
    for event in events:
        usage |= event.get("usage") or event.get("message", {}).get("usage") or {}
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            given = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "text_delta":
                blocks[-1]["text"] += delta["text"]
            elif delta["type"] == "input_json_delta":
                given += delta["partial_json"]
                blocks[-1]["given"] = given
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("given", "{}"))
    call_id = next((b["id"] for b in blocks if b["type"] == "tool_use"), "")
    usage = {"prompt_tokens": sum(v for k, v in usage.items() if _is_input(k) and v)}
    return Answer([{"role": "assistant", "content": blocks}], call_id, usage, len(events))


def _is_input(key: str) -> bool:
    return key in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def _of_responses(events: list[Json]) -> Answer:
    items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    call_id = next((i["call_id"] for i in items if i["type"] == "function_call"), "")
    last = next(e for e in events if e["type"] == "response.completed")
    usage = {"prompt_tokens": last["response"]["usage"]["input_tokens"]}
    return Answer(items, call_id, usage, len(events))


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of processes, all their threads, which the kernel counts in nanoseconds."""
    total = 0
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total += int(file.read_text().split()[0])
    return total / 1e9


@dataclass
class Turn:
    """CPU milliseconds of one turn: to its first event, and all of it."""

    first_ms: float
    all_ms: float
    new: int
    num_events: int


def drive(
    port: int,
    dialect: str,
    pids: list[int],
    idle: float,
    chars: float,
    answer_tokens: int,
    turns: int,
    new: int,
) -> Json:
    """A session up to 100,000 tokens, then `turns` of `new` tokens each, whose CPU is counted.

    `idle`: CPU seconds a second that the server takes anyway; `chars` of a token.
    """
    rng = random.Random(7)
    grown, source = sizes()
    session = Session(dialect, text_of(rng, 9000), schemas(rng, round(11_000 * chars)))
    begin = len(session.body(0)) / chars
    session.ask(text_of(rng, round(max(100, grown[0] - begin) * chars)))
    growth = [b - a for a, b in itertools.pairwise(grown)] + [new] * turns
    measured: list[Turn] = []
    before = 0
    for i, step in enumerate([*growth, 0]):
        turn, answer = _turn(port, session, pids, idle, answer_tokens)
        now = answer.usage["prompt_tokens"]
        if i >= len(grown):
            turn.new = now - before
            measured.append(turn)
        before = now
        if step:
            session.go_on(answer, text_of(rng, round(max(20, step - answer_tokens) * chars)))
    measured.sort(key=lambda t: t.all_ms)
    middle = measured[len(measured) // 2]
    firsts = sorted(t.first_ms for t in measured)
    return {
        "dialect": dialect,
        "sizes": source,
        "messages": len(session.items) + (dialect == "chat"),
        "body_bytes": len(session.body(answer_tokens)),
        "prompt_tokens": before,
        "new_tokens": middle.new,
        "turns": len(measured),
        "events": middle.num_events,
        "to_first_ms": round(firsts[len(firsts) // 2], 2),
        "to_first_min_ms": round(firsts[0], 2),
        "turn_ms": round(middle.all_ms, 2),
        "turn_min_ms": round(measured[0].all_ms, 2),
        "turn_max_ms": round(measured[-1].all_ms, 2),
    }


def _turn(
    port: int, session: Session, pids: list[int], idle: float, tokens: int
) -> tuple[Turn, Answer]:
    body = session.body(tokens)
    seen: list[float] = []

    def spent() -> float:
        return cpu_s(pids) - idle * time.monotonic()

    time.sleep(0.02)  # what is left of the turn before
    begin = spent()
    answer = post(port, session.dialect, body, lambda: seen.append(spent()))
    time.sleep(0.02)
    end = spent()
    return Turn((seen[0] - begin) * 1e3, (end - begin) * 1e3, 0, answer.num_events), answer
