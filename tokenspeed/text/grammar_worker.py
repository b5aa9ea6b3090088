# SPDX-License-Identifier: MIT
"""The process that compiles grammars: a parent that has loaded xgrammar, and forks that compile.

    front end <- pipes -> this process <- socket -> a fork that compiles, one job at a time
                                       <- socket -> another

A fork limits its CPU time and memory; the parent limits wall-clock time, and forks another, which
costs milliseconds, when one dies, must be killed or has done its share. So a grammar that never
ends, or crashes the compiler, costs its own request. Messages are frames: four bytes of length,
then JSON up to the first newline and bytes after it. Ends with the front end's pipe.
"""

import contextlib
import json
import os
import random
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from io import BufferedRWPair
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tokenspeed.execution.grammars import tokenizer_info
from tokenspeed.text.ebnf import (
    in_json_string,
    with_little_space,
    with_tight_values,
    with_tokens,
)

if TYPE_CHECKING:
    import xgrammar

MAX_DATA = 32 << 20  # bytes of a compiled grammar
MEMORY_BYTES = 1 << 30  # that a fork may take beyond what it begins with
MASK_S = 0.1  # of CPU that a token may take: all requests of an engine wait for each
TRIED_TOKENS = 16
JOBS_PER_FORK = 1000  # the compiler's memory goes back with its process
_NICENESS = 5  # of a fork: what answers clients comes first
_MAX_FRAME = 64 << 20
_LENGTH = struct.Struct("<I")

Header = dict[str, Any]
Pipe = IO[bytes] | BufferedRWPair


def write_frame(pipe: Pipe, header: Header, data: bytes = b"") -> None:
    """One message."""
    text = json.dumps(header).encode() + b"\n"
    pipe.write(_LENGTH.pack(len(text) + len(data)) + text + data)
    pipe.flush()


def read_frame(pipe: Pipe) -> tuple[Header, bytes] | None:
    """The next message; None at the end of the pipe, or where there was no whole message."""
    try:
        (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
        frame = _exactly(pipe, length) if length <= _MAX_FRAME else b""
    except (struct.error, OSError):
        return None
    head, newline, data = frame.partition(b"\n")
    if len(frame) != length or not newline:
        return None
    return dict(json.loads(head)), data


def _exactly(pipe: Pipe, size: int) -> bytes:
    """Less only at the end of the pipe."""
    parts: list[bytes] = []
    while size > 0 and (part := pipe.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@dataclass(eq=False)
class Fork:
    """A process that compiles. `job`: whose grammar it is at, until `deadline`."""

    pid: int
    socket: socket.socket
    pipe: Pipe
    job: int | None = None
    deadline: float = float("inf")
    num_jobs: int = 0

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):  # what it will not read any more
            self.pipe.close()
        self.socket.close()
        os.waitpid(self.pid, 0)


class Foreman:
    """Gives jobs to forks, answers for those that do not come back."""

    def __init__(
        self, pipe: IO[bytes], info: "xgrammar.TokenizerInfo", limits: dict[str, float]
    ) -> None:
        self._pipe, self._info, self._limits = pipe, info, limits
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)
        # By whose they are; owners take turns. What has been given to a fork is not in here.
        self._waiting: OrderedDict[str, deque[tuple[Header, bytes]]] = OrderedDict()
        self._forks: list[Fork] = []

    def run(self) -> None:
        """Until the front end's pipe ends."""
        while True:
            self._give()
            deadline = min((fork.deadline for fork in self._forks), default=float("inf"))
            wait = None if deadline == float("inf") else max(deadline - time.monotonic(), 0.0)
            for key, _ in self._selector.select(wait):
                if key.data is not None:
                    if key.data in self._forks:  # not dismissed by an event before this one
                        self._answer(key.data)
                elif (frame := read_frame(self._pipe)) is None:
                    return
                elif frame[0].get("abandon"):
                    self._abandon(frame[0]["id"])
                else:
                    self._waiting.setdefault(frame[0]["owner"], deque()).append(frame)
            for fork in [fork for fork in self._forks if fork.deadline <= time.monotonic()]:
                self._lost(fork)

    def close(self) -> None:
        for fork in self._forks:
            fork.end()

    def _give(self) -> None:
        while self._waiting:
            idle = next((fork for fork in self._forks if fork.job is None), None)
            if idle is None and len(self._forks) >= self._limits["num_forks"]:
                return
            fork = idle or self._fork()
            header, data = self._next()
            fork.job, fork.num_jobs = header["id"], fork.num_jobs + 1
            fork.deadline = time.monotonic() + self._limits["wall_s"]
            try:
                write_frame(fork.pipe, header, data)
            except OSError:
                self._lost(fork)

    def _next(self) -> tuple[Header, bytes]:
        owner, frames = self._waiting.popitem(last=False)
        frame = frames.popleft()
        if frames:
            self._waiting[owner] = frames  # behind all others
        return frame

    def _abandon(self, job: int) -> None:
        """Nobody waits for this one: others need not wait for it either."""
        for owner, frames in list(self._waiting.items()):
            left = deque(frame for frame in frames if frame[0]["id"] != job)
            self._waiting[owner] = left
            if not left:
                del self._waiting[owner]
        for fork in [fork for fork in self._forks if fork.job == job]:
            self._dismiss(fork)

    def _answer(self, fork: Fork) -> None:
        frame = read_frame(fork.pipe)
        if frame is None:
            self._lost(fork)
            return
        write_frame(sys.stdout.buffer, *frame)
        fork.job, fork.deadline = None, float("inf")
        if fork.num_jobs >= JOBS_PER_FORK:
            self._dismiss(fork)

    def _lost(self, fork: Fork) -> None:
        job = fork.job
        self._dismiss(fork)
        if job is not None:
            why = "takes too much time or memory to compile"
            write_frame(sys.stdout.buffer, {"id": job, "error": why, "code": "grammar_limit"})

    def _dismiss(self, fork: Fork) -> None:
        self._forks.remove(fork)
        self._selector.unregister(fork.socket)
        fork.end()

    def _fork(self) -> Fork:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _compile_until_end(theirs, self._info, self._limits["cpu_s"])
        theirs.close()
        fork = Fork(pid, ours, ours.makefile("rwb"))
        self._forks.append(fork)
        self._selector.register(ours, selectors.EVENT_READ, fork)
        return fork


def _compile_until_end(
    connection: socket.socket, info: "xgrammar.TokenizerInfo", cpu_s: float
) -> None:
    """The fork. Never returns."""
    try:
        os.nice(_NICENESS)
        quiet = os.open(os.devnull, os.O_RDWR)  # the compiler's warnings quote clients
        for number in (0, 1, 2):
            os.dup2(quiet, number)
        _limit_memory()
        pipe = connection.makefile("rwb")
        while (frame := read_frame(pipe)) is not None:
            # The default action of SIGPROF ends the process, even inside one endless C++ call.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            answer = _job(frame[0], json.loads(frame[1]), info)
            signal.setitimer(signal.ITIMER_PROF, 0)
            write_frame(pipe, *answer)
    finally:
        os._exit(0)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _job(header: Header, spec: Any, info: "xgrammar.TokenizerInfo") -> tuple[Header, bytes]:
    try:
        data = compile_spec(spec, info)
    except MemoryError:
        return _refusal(header, "takes too much memory to compile", "grammar_limit")
    except TimeoutError as error:
        return _refusal(header, str(error), "grammar_limit")
    except Exception as error:
        if "bad_alloc" in str(error):
            return _refusal(header, "takes too much memory to compile", "grammar_limit")
        return _refusal(header, _plain(str(error)), "invalid_grammar")
    if len(data) > MAX_DATA:
        return _refusal(header, "is too large once compiled", "grammar_limit")
    return {"id": header["id"]}, data


def _refusal(header: Header, why: str, code: str) -> tuple[Header, bytes]:
    return {"id": header["id"], "error": why, "code": code}, b""


def compile_spec(spec: dict[str, Any], info: "xgrammar.TokenizerInfo") -> bytes:
    """`{"format": structural tag, "tokens": {marker: id}}` -> xgrammar's compiled form.

    The markers are those of tags in arguments that are no JSON.

    Besides xgrammar's own, a tag may hold `{"type": "foreign", "syntax": "lark" | "ebnf" | "regex",
    "text": .., "quoted": bool}`: a grammar in that syntax, or of a JSON string of what it matches.
    Raises whatever xgrammar does, `ValueError` for a grammar that nothing fits, and `TimeoutError`
    for one that takes too long to follow.
    """
    import xgrammar

    tag = _translate(spec["format"], spec["tokens"], info)
    grammar = xgrammar.Grammar.from_structural_tag({"type": "structural_tag", "format": tag})
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    compiled = compiler.compile_grammar(grammar)
    _try_out(compiled, info)
    return compiled.serialize_json().encode()


def _try_out(grammar: "xgrammar.CompiledGrammar", info: "xgrammar.TokenizerInfo") -> None:
    """Follows the grammar for some tokens, as the engine would; the same ones every time."""
    import xgrammar

    matcher, chance = xgrammar.GrammarMatcher(grammar), random.Random(0)
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    for n in range(TRIED_TOKENS):
        begin = time.process_time()
        matcher.fill_next_token_bitmask(mask)
        bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")
        if n == 0 and not bits.any():
            raise ValueError("nothing fits this grammar")
        bits[info.stop_token_ids] = 0
        further = bits.nonzero()[0]
        fits = len(further) and matcher.accept_token(int(chance.choice(further)))
        if time.process_time() - begin > MASK_S:
            raise TimeoutError("takes too long to follow, token by token")
        if not fits:
            return


def _translate(tag: Any, tokens: dict[str, int], info: "xgrammar.TokenizerInfo") -> Any:
    """The tag with its schemas and foreign grammars as EBNF. Not deeper than specs may be."""
    import xgrammar

    if isinstance(tag, list):
        return [_translate(one, tokens, info) for one in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.get("type") == "json_schema":
        alone = {"type": "structural_tag", "format": tag}
        text = str(xgrammar.Grammar.from_structural_tag(alone))
        style = tag.get("style", "json")
        if style != "json":
            text = with_tight_values(text, padded=style == "qwen_xml")
        text = with_little_space(text)
        if style != "json" and tokens:
            text = with_tokens(text, tokens)
        return {"type": "grammar", "grammar": text}
    if tag.get("type") != "foreign":
        return {name: _translate(value, tokens, info) for name, value in tag.items()}
    text = tag["text"]
    if tag["syntax"] == "lark":
        text = str(xgrammar.Grammar.from_lark(text, tokenizer_info=info))
    elif tag["syntax"] == "regex":
        text = str(xgrammar.Grammar.from_regex(text))
    else:
        text = str(xgrammar.Grammar.from_ebnf(text))
    return {"type": "grammar", "grammar": in_json_string(text) if tag["quoted"] else text}


def _plain(message: str) -> str:
    """The compiler's words without the place in its source."""
    first = message.strip().splitlines()[0] if message.strip() else "cannot be compiled"
    if first.startswith("["):
        first = first.split(": ", 1)[-1]
    return first[:500]


def main() -> None:
    """Reads the vocabulary and the limits, then compiles until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front end decides when to stop
    with open(0, "rb", buffering=0, closefd=False) as pipe:  # a buffer would hide frames
        hello = read_frame(pipe)
        if hello is None:
            return
        limits, vocabulary = hello
        foreman = Foreman(pipe, tokenizer_info(vocabulary), limits)
        try:
            foreman.run()
        finally:
            foreman.close()


if __name__ == "__main__":
    main()
