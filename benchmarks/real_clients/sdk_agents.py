# SPDX-License-Identifier: MIT
"""Agents of one loop over the vendors' SDKs, streamed: they ask, run two tools, and send it back.

    python sdk_agents.py chat|responses|messages URL MODEL TASK

Runs in an environment that has `openai` and `anthropic` and nothing of this project.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_TURNS = 8
SYSTEM = "You are an agent for software. Use the tools; say what came out in the end. " * 10
TOOLS: dict[str, dict[str, Any]] = {
    "write_file": {"path": {"type": "string"}, "text": {"type": "string"}},
    "run": {"command": {"type": "string"}},
}


def schema(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": TOOLS[name], "required": list(TOOLS[name])}


def use(name: str, arguments: dict[str, str]) -> str:
    """What a tool says."""
    if name == "write_file":
        Path(arguments["path"]).write_text(arguments["text"])
        return "written"
    done = subprocess.run(arguments["command"], shell=True, capture_output=True, text=True)
    return f"{done.stdout}{done.stderr}exit status {done.returncode}"


def chat(url: str, model: str, task: str) -> str:
    """`openai`, /v1/chat/completions."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="x")
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": schema(name)}}
        for name in TOOLS
    ]
    messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task}]
    for _ in range(MAX_TURNS):
        with client.chat.completions.stream(
            model=model, messages=messages, tools=tools, stream_options={"include_usage": True}
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        if not message.tool_calls:
            return message.content or ""
        calls = [
            {
                "id": one.id,
                "type": "function",
                "function": {"name": one.function.name, "arguments": one.function.arguments},
            }
            for one in message.tool_calls
        ]
        messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
        for one in message.tool_calls:
            said = use(one.function.name, json.loads(one.function.arguments))
            messages.append({"role": "tool", "tool_call_id": one.id, "content": said})
    return ""


def responses(url: str, model: str, task: str) -> str:
    """`openai`, /v1/responses, nothing stored."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="x")
    tools: Any = [
        {"type": "function", "name": name, "parameters": schema(name), "strict": False}
        for name in TOOLS
    ]
    items: Any = [{"role": "user", "content": task}]
    for _ in range(MAX_TURNS):
        with client.responses.stream(
            model=model,
            input=items,
            instructions=SYSTEM,
            tools=tools,
            store=False,
            include=["reasoning.encrypted_content"],
        ) as stream:
            response = stream.get_final_response()
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text
        items += [
            item.model_dump(exclude={"parsed_arguments"}, exclude_none=True, warnings=False)
            for item in response.output
        ]
        for one in calls:
            said = use(one.name, json.loads(one.arguments))
            items.append({"type": "function_call_output", "call_id": one.call_id, "output": said})
    return ""


def messages(url: str, model: str, task: str) -> str:
    """`anthropic`, /v1/messages, with thinking."""
    from anthropic import Anthropic

    client = Anthropic(base_url=url, api_key="x")
    tools: Any = [{"name": name, "input_schema": schema(name)} for name in TOOLS]
    history: Any = [{"role": "user", "content": task}]
    for _ in range(MAX_TURNS):
        with client.messages.stream(
            model=model,
            system=[{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}],
            messages=history,
            tools=tools,
            max_tokens=4096,
            thinking={"type": "enabled", "budget_tokens": 2048},
        ) as stream:
            message = stream.get_final_message()
        results: list[dict[str, Any]] = []
        for block in message.content:
            if block.type == "tool_use":
                said = use(block.name, {k: str(v) for k, v in block.input.items()})
                results.append({"type": "tool_result", "tool_use_id": block.id, "content": said})
        if not results:
            return "".join(block.text for block in message.content if block.type == "text")
        history.append({"role": "assistant", "content": message.content})
        history.append({"role": "user", "content": results})
    return ""


def main() -> int:
    dialects: dict[str, Callable[[str, str, str], str]]
    dialects = {"chat": chat, "responses": responses, "messages": messages}
    answer = dialects[sys.argv[1]](*sys.argv[2:5])
    print(answer)
    return 0 if answer else 1


if __name__ == "__main__":
    raise SystemExit(main())
