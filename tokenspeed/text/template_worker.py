# SPDX-License-Identifier: MIT
"""`TemplateWorker`: a `ChatTemplate` in a process that can be killed. Knows no ids, no HTTP.

One line of JSON each way over pipes. The child limits its own CPU time and memory; the parent
limits wall-clock time and starts a new child after a kill, so that a template that never ends
costs one request. The child ends when the parent's end of the pipe closes.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from tokenspeed.errors import ModelLoadError, RequestError
from tokenspeed.text.chat_template import ChatTemplate

CPU_LIMIT_S = 2.0
WALL_LIMIT_S = 6.0
_MEMORY_BYTES = 2 << 30


class TemplateWorker:
    """Renders like `ChatTemplate.render`, one conversation at a time; callable from any thread.

    The child starts with `start` or with the first conversation.
    """

    def __init__(self, template: ChatTemplate, wall_limit_s: float = WALL_LIMIT_S) -> None:
        self._hello = json.dumps(
            {"sources": template.sources, "special_tokens": template.special_tokens}
        )
        self._wall_limit_s = wall_limit_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.num_kills = 0

    def start(self) -> None:
        """Starts the child now, so that the first conversation need not wait for it."""
        with self._lock:
            self._start()

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Prompt text. Raises `RequestError`, also when the template takes too long."""
        call = extra | {"tools": tools, "add_generation_prompt": add_generation_prompt}
        line = json.dumps({"messages": messages, "call": call})
        with self._lock:
            if self._closed:
                raise RequestError("the server is closing", code="template_limit")
            reply = self._exchange(line)
        if reply is None:
            raise RequestError(
                "the chat template took too long or too much memory for this conversation",
                field="messages",
                code="template_limit",
            )
        if "error" in reply:
            raise RequestError(reply["error"], field=reply["field"], code=reply["code"])
        return str(reply["text"])

    def close(self) -> None:
        """Ends the child for good: a later `render` is refused."""
        with self._lock:
            self._closed = True
            self._stop()

    def _exchange(self, line: str) -> dict[str, Any] | None:
        """One question, one answer; None if the child died or had to be killed over it."""
        child = self._child if self._child and self._child.poll() is None else self._start()
        try:
            answer = _talk(child, line.encode() + b"\n", time.monotonic() + self._wall_limit_s)
        except OSError:
            answer = b""
        if answer.endswith(b"\n"):
            return dict(json.loads(answer))
        self.num_kills += 1
        self._start()
        return None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._stop()
        self._child = child = subprocess.Popen(
            [sys.executable, "-m", "tokenspeed.text.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(self._hello.encode() + b"\n")
            child.stdin.flush()
        except OSError:
            raise ModelLoadError("the process that renders chat templates did not start") from None
        for pipe in (child.stdin, child.stdout):
            os.set_blocking(pipe.fileno(), False)
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                # Unsent bytes of a question that the dead child will never read.
                with contextlib.suppress(OSError):
                    pipe.close()


def _talk(child: "subprocess.Popen[bytes]", question: bytes, deadline: float) -> bytes:
    """Writes the question and reads a line, or what there is of it at the deadline."""
    assert child.stdin is not None
    assert child.stdout is not None
    to, back = child.stdin.fileno(), child.stdout.fileno()
    rest, parts = memoryview(question), [b""]
    poll = select.poll()
    poll.register(back, select.POLLIN)
    poll.register(to, select.POLLOUT)
    while not parts[-1].endswith(b"\n"):
        left_ms = (deadline - time.monotonic()) * 1000
        for file, _ in poll.poll(max(left_ms, 0)) if left_ms > 0 else ():
            if file == to:
                rest = rest[os.write(to, rest) :]
                if not rest:
                    poll.unregister(to)
            elif not (part := os.read(back, 1 << 18)):
                return b""  # the child has ended
            else:
                parts.append(part)
        if left_ms <= 0:
            break
    return b"".join(parts)


def _answer(template: ChatTemplate, line: bytes) -> dict[str, Any]:
    question = json.loads(line)
    # The default action of SIGPROF ends the process, even inside one endless C call.
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    try:
        return {"text": template.render(question["messages"], **question["call"])}
    except RequestError as error:
        return {"error": str(error), "field": error.field, "code": error.code}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """The child: the templates first, then one conversation a line until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hello = json.loads(sys.stdin.buffer.readline())
    template = ChatTemplate(hello["sources"], hello["special_tokens"])
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(template, line)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
