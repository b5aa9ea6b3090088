# SPDX-License-Identifier: MIT
"""The clients: what each is told, what the scripted model answers, how it is started.

Knows no server and judges nothing.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from real_clients.install import AIDER, ANTHROPIC, CLAUDE, CODEX, MINI, OPENAI, Package

CUE = "TASK-SEVEN"
TASK = f"{CUE}: write hello.py that prints 42, and run it"
FINAL = "It prints 42."
MODEL = "model"
CODE = "print(6 * 7)\n"
_SHELL = f"printf '{CODE.strip()}\\n' > hello.py"
_RUN = "python3 hello.py"


@dataclass(frozen=True)
class Place:
    """Where a client runs: its server's address, its own folder, and where all are installed."""

    url: str
    work: Path
    home: Path
    clients: Path


@dataclass(frozen=True)
class Client:
    """`answers` are the model's, turn by turn. `linear`: each of its requests continues the one
    before, so that the cache must have all of that."""

    name: str
    package: Package
    dialect: str
    answers: Callable[[Path], list[str]]
    command: Callable[[Place], list[str]]
    env: Callable[[Place], dict[str, str]]
    num_turns: int = 3
    linear: bool = True


def call(name: str, **arguments: str) -> str:
    """A tool call as the scripted model writes it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def turns(write: str, run: str, last: str = "") -> list[str]:
    """Think, talk and write; run; and say what came out."""
    return [
        f"<think>Write it first.</think>I write the file.{write}",
        f"<think>Run it.</think>{run}",
        f"<think>Good.</think>{FINAL}{last}",
    ]


def _claude(work: Path) -> list[str]:
    write = call("Write", file_path=str(work / "hello.py"), content=CODE)
    return turns(write, call("Bash", command=_RUN, description="Run it"))


def _claude_env(place: Place) -> dict[str, str]:
    models = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{m}_MODEL" for m in _TIERS))
    return {
        "ANTHROPIC_BASE_URL": place.url,
        "ANTHROPIC_AUTH_TOKEN": "x",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",
        **dict.fromkeys(models, MODEL),
    }


def _claude_command(place: Place) -> list[str]:
    program = str(place.clients / "node_modules/.bin/claude")
    shown = ["--output-format", "stream-json", "--verbose"]
    return [program, "-p", TASK, *shown, "--permission-mode", "bypassPermissions"]


def _codex(work: Path) -> list[str]:
    return turns(call("exec_command", cmd=_SHELL), call("exec_command", cmd=_RUN))


def _codex_command(place: Place) -> list[str]:
    program = str(place.clients / "node_modules/.bin/codex")
    provider = {
        "name": "local",
        "base_url": f"{place.url}/v1",
        "env_key": "OPENAI_API_KEY",
        "wire_api": "responses",
    }
    settings = {"model_provider": "local"}
    settings |= {f"model_providers.local.{key}": value for key, value in provider.items()}
    given = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    bare = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return [program, "exec", "--json", *bare, "-m", MODEL, *given, TASK]


def _codex_env(place: Place) -> dict[str, str]:
    (place.home / ".codex").mkdir(parents=True, exist_ok=True)
    return {"CODEX_HOME": str(place.home / ".codex"), "OPENAI_API_KEY": "x"}


def _mini(work: Path) -> list[str]:
    submit = call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    return turns(call("bash", command=_SHELL), call("bash", command=_RUN), submit)


def _mini_command(place: Place) -> list[str]:
    program = str(place.clients / MINI.home / "bin/mini")
    base = f"model.model_kwargs.api_base={place.url}/v1"
    settings = ["-c", "mini.yaml", "-c", base]
    return [program, "-m", f"openai/{MODEL}", "-t", TASK, "-y", "--exit-immediately", *settings]


def _litellm_env(place: Place) -> dict[str, str]:
    return {
        "MSWEA_CONFIGURED": "true",
        "MSWEA_COST_TRACKING": "ignore_errors",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "x",
    }


def _aider(work: Path) -> list[str]:
    """It has no tools: it runs the test's command after each edit and shows what failed. Before
    its second request it puts turns of its own into the model's mouth, three at most."""
    wrong = "<think>Write it.</think>hello.py\n```python\nprint(6 * seven)\n```\n"
    right = f"<think>A name.</think>{FINAL}\nhello.py\n```python\n{CODE}```\n"
    return [wrong, *[right] * 4]


def _aider_command(place: Place) -> list[str]:
    program = str(place.clients / AIDER.home / "bin/aider")
    server = ["--model", f"openai/{MODEL}", "--openai-api-base", f"{place.url}/v1"]
    quiet = ["--no-analytics", "--no-check-update", "--no-show-release-notes", "--yes-always"]
    plain = ["--no-git", "--map-tokens", "0", "--no-show-model-warnings", "--no-auto-lint"]
    test = ["--auto-test", "--test-cmd", _RUN]
    return [program, *server, *quiet, *plain, *test, "--message", TASK, "hello.py"]


def _sdk(name: str, package: Package, dialect: str) -> Client:
    def answers(work: Path) -> list[str]:
        return turns(call("write_file", path="hello.py", text=CODE), call("run", command=_RUN))

    def command(place: Place) -> list[str]:
        program = str(Path(__file__).with_name("sdk_agents.py"))
        python = str(place.clients / package.home / "bin/python")
        return [python, program, dialect, place.url, MODEL, TASK]

    return Client(name, package, dialect, answers, command, lambda place: {})


_TIERS = ("OPUS", "SONNET", "HAIKU")
CLIENTS = {
    client.name: client
    for client in (
        Client("claude-code", CLAUDE, "messages", _claude, _claude_command, _claude_env),
        Client("codex", CODEX, "responses", _codex, _codex_command, _codex_env),
        Client("mini-swe-agent", MINI, "chat", _mini, _mini_command, _litellm_env),
        Client("aider", AIDER, "chat", _aider, _aider_command, _litellm_env, 2, linear=False),
        _sdk("openai-chat", OPENAI, "chat"),
        _sdk("openai-responses", OPENAI, "responses"),
        _sdk("anthropic", ANTHROPIC, "messages"),
    )
}


def environment(client: Client, place: Place) -> dict[str, str]:
    """Nothing of the user's own settings: a home of its own, and what the client needs."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    return {**kept, "HOME": str(place.home), "TERM": "dumb", **client.env(place)}
