# SPDX-License-Identifier: MIT
"""`GrammarCompiler`: what an answer must look like -> a compiled grammar that the engine can hold.

Compiles in another process (`text/grammar_worker.py`) and keeps the latest, bounded in bytes. Knows
structural tags and the vocabulary; refuses to know requests' fields and the engine's wire.
"""

import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tokenspeed.engine.messages import AddGrammar, DropGrammar
from tokenspeed.errors import RequestError
from tokenspeed.execution.grammars import VOCABULARY, pack_vocabulary
from tokenspeed.execution.sampling_params import Grammar
from tokenspeed.text.grammar_worker import read_frame, write_frame
from tokenspeed.text.tokenizer import Tokenizer

CPU_LIMIT_S = 5.0
WALL_LIMIT_S = 15.0
NUM_FORKS = 2
CACHE_BYTES = 128 << 20
MAX_WAITING = 256  # grammars that wait to be compiled
MAX_WAITING_EACH = 64  # of one owner that has a name
_CHILD = """
import os
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # what forks has no threads
from tokenspeed.text.grammar_worker import main
main()
"""
_NO_TEXT = b"\xff"  # in no text of ours: a token that begins so is matched as a token alone


@dataclass(frozen=True)
class GrammarSpec:
    """A structural tag's format, and the texts in it that are tokens of the vocabulary.

    `field`: the request's field that asks for it; no part of what it is.
    """

    format: dict[str, Any]
    tokens: Mapping[str, int] = field(default_factory=dict)
    field: str = field(default="structured_outputs", compare=False)


class CompiledGrammar(Grammar):
    """A grammar with its bytes, which stay here: requests carry the key alone.

    Whoever holds one keeps the engine's copy alive.
    """

    data: bytes
    vocabulary: bytes

    def __init__(self, key: str, data: bytes, vocabulary: bytes) -> None:
        super().__init__(key)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "vocabulary", vocabulary)


class GrammarMirror:
    """What one engine was sent. `send` says False if the engine does not listen just now."""

    def __init__(self, send: Callable[[AddGrammar | DropGrammar], bool]) -> None:
        self._send = send
        self._held: set[str] = set()
        self._dead: deque[str] = deque()  # keys that nobody can name any more

    def provide(self, grammar: Grammar) -> bool:
        """Sends what the engine has not got yet; False if it does not listen."""
        self.sweep()
        if not isinstance(grammar, CompiledGrammar) or grammar.key in self._held:
            return True
        if VOCABULARY not in self._held:
            if not self._send(AddGrammar(VOCABULARY, grammar.vocabulary)):
                return False
            self._held.add(VOCABULARY)
        if not self._send(AddGrammar(grammar.key, grammar.data)):
            return False
        self._held.add(grammar.key)
        # From any thread, at any time: only noted here.
        weakref.finalize(grammar, self._dead.append, grammar.key).atexit = False
        return True

    def sweep(self) -> None:
        """Drops what nobody here can name any more. To be called now and then."""
        while self._dead and self._send(DropGrammar(self._dead[0])):
            self._held.discard(self._dead.popleft())


class GrammarCompiler:
    """Callable from any thread. The other process starts with `start` or the first grammar."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        cache_bytes: int = CACHE_BYTES,
        cpu_limit_s: float = CPU_LIMIT_S,
        wall_limit_s: float = WALL_LIMIT_S,
    ) -> None:
        """`vocab_size`: logits that the model gives, which may be more or fewer than tokens."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._limits = {"cpu_s": cpu_limit_s, "wall_s": wall_limit_s, "num_forks": NUM_FORKS}
        self._cache_bytes = cache_bytes
        self._lock = threading.RLock()
        self._vocabulary: bytes | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._recent: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._recent_bytes = 0
        self._alive: weakref.WeakValueDictionary[str, CompiledGrammar] = (
            weakref.WeakValueDictionary()
        )
        self._waiting: dict[int, tuple[str, GrammarSpec, Future[CompiledGrammar], str]] = {}
        self._by_key: dict[str, Future[CompiledGrammar]] = {}
        self._last_id = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the grammars that are kept."""
        return self._recent_bytes

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Waits for `submit`."""
        return self.submit(spec).result()

    def submit(self, spec: GrammarSpec, owner: str = "") -> "Future[CompiledGrammar]":
        """The grammar, or a `RequestError` naming `spec.field`, here or in the future.

        Owners take turns where many grammars wait; what belongs to nobody has one owner, "".
        """
        text = json.dumps({"format": spec.format, "tokens": dict(spec.tokens)})
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._lock:
            found = self._alive.get(key)
            if found is not None:
                self._keep(found)
                ready: Future[CompiledGrammar] = Future()
                ready.set_result(found)
                return ready
            if key in self._by_key:
                return self._by_key[key]
            if self._closed:
                raise RequestError("the server is closing", code="grammar_limit")
            own = sum(waiting[3] == owner for waiting in self._waiting.values()) if owner else 0
            if len(self._waiting) >= MAX_WAITING or own >= MAX_WAITING_EACH:
                why = "too many grammars wait to be compiled: try again"
                raise RequestError(f"{spec.field}: {why}", field=spec.field, code="grammar_limit")
            child = self._child if self._child and self._child.poll() is None else self._start()
            self._last_id += 1
            future: Future[CompiledGrammar] = Future()
            self._waiting[self._last_id] = key, spec, future, owner
            self._by_key[key] = future
            assert child.stdin is not None
            try:
                write_frame(child.stdin, {"id": self._last_id, "owner": owner}, text.encode())
            except OSError:
                self._fail_all(child)
        return future

    def abandon(self, future: "Future[CompiledGrammar]") -> None:
        """Nobody waits for what `submit` gave: it is cancelled, and not compiled to its end."""
        with self._lock:
            jobs = [job for job, entry in self._waiting.items() if entry[2] is future]
            for job in jobs:
                del self._by_key[self._waiting.pop(job)[0]]
                if self._child is not None and self._child.stdin is not None:
                    with contextlib.suppress(OSError):  # it has ended
                        write_frame(self._child.stdin, {"id": job, "abandon": True}, b"")
        future.cancel()

    def start(self) -> None:
        """Starts the other process now, which takes seconds. `RequestError` without xgrammar."""
        with self._lock:
            if self._child is None:
                self._start()

    def close(self) -> None:
        """Ends the other process for good; what waits for it fails."""
        with self._lock:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            self._end(child)

    def vocabulary(self) -> bytes:
        """The vocabulary as the engine takes it. Added tokens count as tokens, never as text."""
        if self._vocabulary is None:
            tokenizer, size = self._tokenizer, self._vocab_size
            tokens = [
                _NO_TEXT + tokenizer.token_bytes(token)
                if token in tokenizer.added_tokens
                else tokenizer.token_bytes(token)
                for token in range(size)
            ]
            stop_ids = [token for token in tokenizer.eos_ids if token < size]
            self._vocabulary = pack_vocabulary(tokens, stop_ids)
        return self._vocabulary

    def _start(self) -> "subprocess.Popen[bytes]":
        if importlib.util.find_spec("xgrammar") is None:
            raise RequestError(
                "structured output needs the package xgrammar, which is not installed here",
                field="structured_outputs",
                code="unsupported_parameter",
            )
        if self._child is not None:
            self._end(self._child)
        self._child = child = subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdin is not None
        write_frame(child.stdin, self._limits, self.vocabulary())
        threading.Thread(target=self._listen, args=(child,), name="grammars", daemon=True).start()
        return child

    def _end(self, child: "subprocess.Popen[bytes]") -> None:
        child.kill()
        child.wait()
        assert child.stdin is not None
        with contextlib.suppress(OSError):  # what it will not read any more
            child.stdin.close()
        self._fail_all(child)

    def _listen(self, child: "subprocess.Popen[bytes]") -> None:
        assert child.stdout is not None
        with child.stdout as pipe:
            while (frame := read_frame(pipe)) is not None:
                self._take(*frame)
        self._fail_all(child)

    def _take(self, answer: dict[str, Any], data: bytes) -> None:
        with self._lock:
            waiting = self._waiting.pop(answer["id"], None)
            if waiting is None:
                return
            key, spec, future, _ = waiting
            del self._by_key[key]
            if not future.set_running_or_notify_cancel():  # from here on nobody can cancel it
                return
            if "error" not in answer:
                grammar = CompiledGrammar(key, data, self.vocabulary())
                self._alive[key] = grammar
                self._keep(grammar)
        if "error" in answer:
            why = f"{spec.field}: {answer['error']}"
            future.set_exception(RequestError(why, field=spec.field, code=answer["code"]))
        else:
            future.set_result(grammar)

    def _fail_all(self, child: "subprocess.Popen[bytes]") -> None:
        """The process has ended: nothing that it was asked will be answered."""
        with self._lock:
            if self._child not in (None, child):
                return
            lost, self._waiting, self._by_key = self._waiting, {}, {}
        for _, spec, future, _ in lost.values():
            if not future.set_running_or_notify_cancel():
                continue
            why = f"{spec.field}: the process that compiles grammars has ended"
            future.set_exception(RequestError(why, field=spec.field, code="grammar_limit"))

    def _keep(self, grammar: CompiledGrammar) -> None:
        """Makes it the latest; the oldest go."""
        if self._recent.pop(grammar.key, None) is None:
            self._recent_bytes += len(grammar.data)
        self._recent[grammar.key] = grammar
        while self._recent_bytes > self._cache_bytes and len(self._recent) > 1:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= len(oldest.data)
