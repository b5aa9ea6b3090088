# SPDX-License-Identifier: MIT
"""Where the CPU of a turn of a long session goes, in the running gateway.

Puts stamps of each thread's own CPU time into a gateway (the null engine's `serve`), drives one
chat session of 100,000 tokens through it and prints medians over its last turns, in microseconds.
What the kernel spends on reading the body before the first stamp is not in it.

    python benchmarks/turn_profile.py [--turns 15] [--new 700] [--port 8312]
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import front_ends
import null_engine
import sessions

_now = time.thread_time
_marks: list[tuple[str, float]] = []  # of the event loop's thread, in the turn at hand
_turns: list[dict[str, float]] = []


def _mark(name: str) -> None:
    _marks.append((name, _now()))


def _end_turn() -> None:
    """Sums what the last turn's marks say: each names what came before it."""
    if len(_marks) > 1:
        spent: dict[str, float] = {}
        before, streamed = _marks[0][1], False
        for name, at in _marks[1:]:
            if name.startswith("in a thread"):
                spent[name] = at
                continue
            name = f"later tokens: {name}" if streamed else name
            spent[name] = spent.get(name, 0.0) + at - before
            streamed = streamed or name == "encode and write the event"
            before = at
        _turns.append(spent)
    _marks.clear()


def _after(owner: Any, name: str, label: str, first: str = "") -> None:
    """Puts a mark after each call, and one that is called `first` before it."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    async def waits(*args: Any, **kwargs: Any) -> Any:
        if first:
            _mark(first)
        result = await inner(*args, **kwargs)
        _mark(label)
        return result

    @functools.wraps(inner)
    def runs(*args: Any, **kwargs: Any) -> Any:
        if first:
            _mark(first)
        result = inner(*args, **kwargs)
        _mark(label)
        return result

    is_async = bool(inner.__code__.co_flags & 0x80)
    setattr(owner, name, waits if is_async else runs)


def _in_thread(owner: Any, name: str, label: str) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def runs(*args: Any, **kwargs: Any) -> Any:
        begin = _now()
        result = inner(*args, **kwargs)
        _marks.append((f"in a thread: {label}", _now() - begin))
        return result

    setattr(owner, name, runs)


def _stamp() -> None:
    from tokenspeed.gateway import app, generation, http_protocol, openai_chat, service
    from tokenspeed.text import canonical, history, history_keys, history_tail, prompt

    begin = http_protocol.BoundedProtocol.on_message_begin

    def on_message_begin(self: Any) -> None:
        _end_turn()
        _mark("begin")
        begin(self)

    http_protocol.BoundedProtocol.on_message_begin = on_message_begin  # type: ignore[method-assign]
    _after(app.Call, "body", "read the body")
    _after(app, "decode_json", "decode JSON into the dialect's types")
    _after(openai_chat, "_turn_request", "check depth, tools, parameters, caller")
    _after(service.Service, "prompt", "hand over to the thread and back")
    _after(
        generation.Generation,
        "__enter__",
        "encode the message to the engine, send",
        "parser, detokenizer, choices",
    )
    _after(generation.Generation, "next", "receive outputs, detokenize, parse")
    _after(generation.Generation, "_write", "encode and write the event")
    _in_thread(prompt.Prompts, "make", "all of it")
    _in_thread(canonical.Canonical, "apply", "canonical form, digest of tools")
    _in_thread(history_keys.ConversationKeys, "chain", "digests of the messages")
    _in_thread(history.History, "find", "look up the turn")
    _in_thread(history_tail.Tails, "tail", "render the tail (its process not counted)")
    _in_thread(history.Known, "ids", "ids of the past")
    _in_thread(prompt.Prompts, "_tail_ids", "tokenise the tail")


def _serve(arguments: list[str], result: Path) -> int:
    _stamp()
    sys.argv = ["null_engine", "serve", *arguments]
    status = null_engine.main()
    _end_turn()
    result.write_text(json.dumps(_turns))
    return status


def _medians(turns: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for turn in turns for name in turn)
    value: Callable[[str], float] = lambda n: statistics.median(t.get(n, 0.0) for t in turns)  # noqa: E731
    return {name: round(value(name) * 1e6) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--new", type=int, default=700)
    parser.add_argument("--port", type=int, default=8312)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.serve:
        return _serve([*rest, "--port", str(args.port)], args.serve)
    with tempfile.TemporaryDirectory() as folder:
        said, chars = front_ends.script()
        answer, result = Path(folder, "answer.json"), Path(folder, "turns.json")
        answer.write_text(json.dumps(said))
        command = [sys.executable, "-m", "benchmarks.turn_profile", "--serve", str(result)]
        with front_ends.server("profile", command, answer, 0.005, args.port) as pids:
            shape = (front_ends.ANSWER_TOKENS, args.turns, args.new)
            row = sessions.drive(args.port, "chat", pids, 0.0, chars, *shape)
        turns = json.loads(result.read_text())
    print(json.dumps(row))
    for name, us in _medians(turns[-args.turns :]).items():
        print(f"| {name} | {us} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
