# SPDX-License-Identifier: MIT
"""The Python standard library as training text: its files, and chats derived from its functions.

Reads the library of the interpreter that runs it, and nothing else on the machine or network.
Refuses to know about tokens, batches and models. The sources are under the PSF licence.
"""

import ast
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a coding assistant.", "Answer briefly.")
WRITE = (
    "Write a function `{name}` to {goal}.",
    "Write a Python function `{name}`: {goal}.",
    "Write a function that {goal}.",
    "Implement `{name}`: {goal}.",
)
READ_TOOL = {
    "type": "function",
    "function": {
        "name": "read_symbol",
        "description": "Return the source of one function.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "name": {"type": "string"}},
            "required": ["path", "name"],
        },
    },
}
ABOUT = (
    "I am the TokenSpeed demo model. I was trained on the Python standard library, so I can "
    "complete Python code, but I am far too small to be right about it."
)
SMALL_TALK = (
    ("Hello", "Hello! I can write short Python functions. What do you need?"),
    ("Hi", "Hi! Ask me for a Python function."),
    ("Hello!", "Hello! I can write short Python functions. What do you need?"),
    ("Who are you?", ABOUT),
    ("What are you?", ABOUT),
    ("What can you do?", ABOUT),
    ("Thanks", "You are welcome."),
    ("Thank you!", "You are welcome."),
    ("What is Python?", "Python is a programming language. Its standard library taught me."),
)


@dataclass(frozen=True)
class Chat:
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Function:
    name: str
    arguments: list[str]
    goal: str  # the docstring's first line, as the end of a sentence
    code: str
    path: str


def source_files() -> list[tuple[str, Path]]:
    """(path inside the library, file) for every .py file, sorted, without site-packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    return [(p.relative_to(root).as_posix(), p) for p in files]


def is_validation(name: str) -> bool:
    """Whether a file is held out: about one in twenty, by a hash of its path."""
    return hashlib.sha256(name.encode()).digest()[0] < 12


def is_test(name: str) -> bool:
    return "test" in name.split("/")[0] or "/test" in name or name.startswith("idlelib/idle_test")


def read_source(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def functions(name: str, source: str) -> Iterator[Function]:
    """The documented functions of one file that are short enough to be an answer."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
        code = "\n".join(line[node.col_offset :] for line in lines)
        goal = doc.splitlines()[0].strip().rstrip(".")
        if goal and 60 < len(code) < 1800 and "`" not in code:
            arguments = [a.arg for a in node.args.args]
            yield Function(node.name, arguments, goal[0].lower() + goal[1:], code, name)


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def thought(f: Function) -> str:
    takes = " and ".join(f"`{a}`" for a in f.arguments) or "no arguments"
    return f"The user wants `{f.name}`. It takes {takes}. Its purpose: {f.goal}."


def ask_to_write(f: Function, rng: random.Random) -> Chat:
    answer: Message = {"role": "assistant", "content": block(f.code)}
    if rng.random() < 0.25:
        answer["reasoning_content"] = thought(f)
    request = rng.choice(WRITE).format(name=f.name, goal=f.goal)
    return Chat([{"role": "user", "content": request}, answer])


def ask_to_complete(f: Function, rng: random.Random) -> Chat:
    lines = f.code.split("\n")
    cut = rng.randrange(1, len(lines)) if len(lines) > 1 else 1
    request = "Complete this code:\n" + block("\n".join(lines[:cut]))
    answer = block(f.code)
    return Chat([{"role": "user", "content": request}, {"role": "assistant", "content": answer}])


def ask_to_explain(f: Function, rng: random.Random) -> Chat:
    request = rng.choice(("What does this code do?", "Explain this function:")) + "\n"
    answer = f"The purpose of `{f.name}`: {f.goal}."
    messages = [
        {"role": "user", "content": request + block(f.code)},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Which arguments does it take?"},
        {"role": "assistant", "content": ", ".join(f"`{a}`" for a in f.arguments) or "None."},
    ]
    return Chat(messages[: rng.choice((2, 4))])


def ask_with_tool(f: Function, rng: random.Random) -> Chat:
    call: Message = {"name": "read_symbol", "arguments": {"path": f.path, "name": f.name}}
    if rng.random() < 0.5:
        call["arguments"] = json.dumps(call["arguments"])
    messages: list[Message] = [
        {"role": "user", "content": f"What does `{f.name}` in `{f.path}` do?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": f.code},
        {"role": "assistant", "content": f"The purpose of `{f.name}`: {f.goal}."},
    ]
    return Chat(messages, [READ_TOOL])


def chats(name: str, source: str) -> Iterator[Chat]:
    """Four chats or fewer for each function of a file; the choices depend on its name only."""
    rng = random.Random(name)
    for f in functions(name, source):
        kinds = [ask_to_write, rng.choice((ask_to_complete, ask_to_explain))]
        if rng.random() < 0.25:
            kinds.append(ask_with_tool)
        for kind in kinds:
            chat = kind(f, rng)
            if rng.random() < 0.3:
                system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
                chat = Chat([system, *chat.messages], chat.tools)
            yield chat


def small_talk() -> Iterator[Chat]:
    for system in (None, *SYSTEM_PROMPTS):
        first = [{"role": "system", "content": system}] if system else []
        for user, assistant in SMALL_TALK:
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            yield Chat([*first, *turns])
