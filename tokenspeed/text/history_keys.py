# SPDX-License-Identifier: MIT
"""`ConversationKeys`: what makes two conversations the same, as a chain of digests. Knows no ids.

    key after message i = H(key after message i - 1, message i)

What clients change when they send a model's own turn back makes no difference: reasoning that they
leave out, white space around the content, the order and spacing of arguments' JSON, parts or one
text, marks of caching. Everything else does.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

_SIZE = 16  # bytes of a digest
_KNOWN = frozenset({"role", "content", "name", "tool_call_id", "cache_control"})
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_EXACT = 1 << 53  # integers beyond are not what they were after a JavaScript client
_MAX_ARGUMENTS = 1 << 16  # digests of arguments that are kept


@dataclass(frozen=True, slots=True)
class Spoken:
    """An answer as its client saw it: runs of content, calls as (name, id, arguments' JSON)."""

    contents: tuple[str, ...]
    calls: tuple[tuple[str, str, str], ...] = ()
    thought: str | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The ways in which it may come back."""
        calls = [
            {"id": call_id, "function": {"name": name, "arguments": arguments}}
            for name, call_id, arguments in self.calls
        ]
        runs = [run for run in self.contents if run.strip()]
        texts = {"".join(runs), "\n".join(runs), "\n\n".join(runs)}
        texts |= {join.join(run.strip() for run in runs) for join in ("", "\n", "\n\n")}
        return [
            {"role": "assistant", "content": text, "tool_calls": calls} for text in sorted(texts)
        ]


class ConversationKeys:
    """Thread-safe; remembers what arguments' JSON it has read, which comes back in every turn."""

    def __init__(self) -> None:
        self._arguments: dict[bytes, bytes] = {}

    def chain(self, root: bytes, messages: Sequence[dict[str, Any]]) -> list[bytes]:
        """The key after each message."""
        keys = []
        for message in messages:
            root = self.follow(root, message)
            keys.append(root)
        return keys

    def follow(self, before: bytes, message: dict[str, Any]) -> bytes:
        """The key after one more message."""
        digest = blake2b(before, digest_size=_SIZE)
        content = plain_text(message.get("content"))
        if message.get("role") == "assistant":
            calls = message.get("tool_calls")
            text = (content or "").strip().encode(errors="surrogatepass")
            digest.update(b"assistant %d " % len(text))
            digest.update(text)
            if content is None:
                digest.update(_json(message.get("content")))
            if isinstance(calls, list):
                for call in calls:
                    digest.update(self._call(call))
            return digest.digest()
        text = (content or "").encode(errors="surrogatepass")
        rest = b"" if message.keys() <= _KNOWN else _json(_rest(message))
        if content is None:
            rest += _json(message.get("content"))
        get = message.get
        head = (get("role"), get("name"), get("tool_call_id"), len(text), len(rest))
        digest.update(repr(head).encode(errors="backslashreplace"))
        digest.update(text)
        digest.update(rest)
        return digest.digest()

    def _call(self, call: Any) -> bytes:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return _json(call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = "{}" if arguments is None else json.dumps(arguments, default=str)
        head = f"call {function.get('name')!r} {call.get('id')!r} ".encode()
        return head + self._arguments_digest(arguments)

    def _arguments_digest(self, text: str) -> bytes:
        raw = blake2b(text.encode(errors="surrogatepass"), digest_size=_SIZE).digest()
        found = self._arguments.get(raw)
        if found is None:
            if len(self._arguments) >= _MAX_ARGUMENTS:
                self._arguments.clear()
            made = canonical_arguments(text).encode(errors="surrogatepass")
            found = self._arguments[raw] = blake2b(made, digest_size=_SIZE).digest()
        return found


def thought_of(message: dict[str, Any]) -> bytes | None:
    """Digest of the reasoning that an assistant's message brings, but for its white space."""
    given = next((t for key in _THOUGHTS if (t := message.get(key))), None)
    return thought_digest(given) if isinstance(given, str) else None


def thought_digest(text: str | None) -> bytes | None:
    """None for no reasoning."""
    words = "".join((text or "").split())
    if not words:
        return None
    return blake2b(words.encode(errors="surrogatepass"), digest_size=_SIZE).digest()


def canonical_arguments(text: str) -> str:
    """Arguments as they are after any client has read and written them again.

    Keys in order, no spacing, whole floats as integers. What is no JSON stays, but for its ends.
    """

    def number(digits: str) -> int | float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    def integer(digits: str) -> int | float:
        if len(digits) < 16 or -_EXACT <= (value := int(digits)) <= _EXACT:
            return int(digits)
        return number(str(value))

    with contextlib.suppress(ValueError, OverflowError, RecursionError):
        value = json.loads(text or "{}", parse_float=number, parse_int=integer)
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text.strip()


def plain_text(content: Any) -> str | None:
    """The text that a template gets of a content; None for what is not all text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, dict) and part.get("type", "text") in _TEXT:
            text = part.get("text")
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)


_TEXT = ("text", "input_text", "output_text")


def _rest(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in _KNOWN}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
