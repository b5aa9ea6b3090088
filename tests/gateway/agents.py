# SPDX-License-Identifier: MIT
"""Agents of three dialects, as small as they can be: they ask, run tools, and send everything back.

What they send back is what real ones do: text trimmed, arguments read and written anew, reasoning
sometimes left out, reminders as system messages in the middle, a first line that rotates.
"""

import json
from typing import Any

SYSTEM = "You are an agent. " * 20
TOOLS = {
    name: {
        "type": "object",
        "properties": {"path": {"type": "string"}, "n": {"type": "number"}},
    }
    for name in ("read_file", "run_tests")
}


class ChatAgent:
    """/v1/chat/completions."""

    path = "/v1/chat/completions"

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "Fix the tests."},
        ]
        self.cached: list[int] = []

    def body(self) -> dict[str, Any]:
        tools = [
            {"type": "function", "function": {"name": name, "parameters": parameters}}
            for name, parameters in TOOLS.items()
        ]
        return {"messages": self.messages, "tools": tools}

    def take(self, reply: dict[str, Any], turn: int) -> None:
        message = reply["choices"][0]["message"]
        self.cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
        echo = {"role": "assistant", "content": (message["content"] or "").strip() or None}
        if turn % 2:
            echo["reasoning_content"] = message.get("reasoning_content")
        results: list[dict[str, Any]] = []
        for call in message.get("tool_calls", []):
            arguments = json.dumps(_again(call["function"]["arguments"]))
            function = {"name": call["function"]["name"], "arguments": arguments}
            one = {"id": call["id"], "type": "function", "function": function}
            echo.setdefault("tool_calls", []).append(one)
            results.append({"role": "tool", "tool_call_id": call["id"], "content": f"ok {turn}"})
        if not results:
            parts = [{"type": "text", "text": f"go on {turn}"}, {"type": "text", "text": ""}]
            results = [{"role": "user", "content": parts}]
        if turn % 4 == 1:
            results.append({"role": "system", "content": f"Reminder {turn}: be brief."})
        self.messages = [*self.messages, echo, *results]


class MessagesAgent:
    """/v1/messages, with a line of billing that is another one every time."""

    path = "/v1/messages"

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": "Fix the tests."}]
        self.cached: list[int] = []

    def body(self) -> dict[str, Any]:
        billing = f"x-anthropic-billing-header: cc_version=2.1; cch={len(self.messages):05x};"
        return {
            "model": "claude",
            "max_tokens": 2000,
            "system": [{"type": "text", "text": billing}, {"type": "text", "text": SYSTEM}],
            "messages": self.messages,
            "tools": [{"name": n, "input_schema": schema} for n, schema in TOOLS.items()],
        }

    def take(self, reply: dict[str, Any], turn: int) -> None:
        self.cached.append(reply["usage"]["cache_read_input_tokens"])
        echo, results = [], []
        for block in reply["content"]:
            if block["type"] == "text":
                block = {**block, "text": block["text"].rstrip()}
            elif block["type"] == "tool_use":
                block = {**block, "input": _again(json.dumps(block["input"]))}
                results.append(
                    {"type": "tool_result", "tool_use_id": block["id"], "content": f"ok {turn}"}
                )
            elif turn % 2:
                continue
            echo.append(block)
        results = results or [{"type": "text", "text": f"go on {turn}"}]
        more = [{"role": "assistant", "content": echo}, {"role": "user", "content": results}]
        if turn % 4 == 1:
            more.append({"role": "system", "content": f"Reminder {turn}: be brief."})
        self.messages = [*self.messages, *more]


class ResponsesAgent:
    """/v1/responses, everything sent again."""

    path = "/v1/responses"

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = [{"role": "user", "content": "Fix the tests."}]
        self.cached: list[int] = []

    def body(self) -> dict[str, Any]:
        return {
            "model": "null",
            "instructions": SYSTEM,
            "input": self.items,
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "tools": [
                {"type": "function", "name": n, "parameters": schema, "strict": False}
                for n, schema in TOOLS.items()
            ],
        }

    def take(self, reply: dict[str, Any], turn: int) -> None:
        self.cached.append(reply["usage"]["input_tokens_details"]["cached_tokens"])
        echo, results = [], []
        for item in reply["output"]:
            if item["type"] == "function_call":
                item = {**item, "arguments": json.dumps(_again(item["arguments"]))}
                results.append(
                    {
                        "type": "function_call_output",
                        "call_id": item["call_id"],
                        "output": f"ok {turn}",
                    }
                )
            elif item["type"] == "reasoning" and turn % 2:
                continue
            echo.append(item)
        results = results or [{"role": "user", "content": f"go on {turn}"}]
        if turn % 4 == 1:
            results.append({"role": "developer", "content": f"Reminder {turn}: be brief."})
        self.items = [*self.items, *echo, *results]


def _again(arguments: str) -> dict[str, Any]:
    """Arguments as a client that is written in another language has them: in another order, whole
    floats as integers."""
    value = json.loads(arguments)
    return {
        key: int(v) if isinstance(v, float) and v.is_integer() else v
        for key, v in reversed(value.items())
    }
