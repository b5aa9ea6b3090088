# SPDX-License-Identifier: MIT
"""An answer's events as Anthropic's content blocks, whole or streamed. Knows no requests.

    message_start (content_block_start content_block_delta* content_block_stop)*
    message_delta message_stop

Blocks of nothing but white space are left out: clients send them back, and they are refused there.
"""

import base64
import hmac
import json
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenspeed.gateway.answer import Answer, Block
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.app import encode_json
from tokenspeed.gateway.generation import Choice
from tokenspeed.gateway.messages_error import failure
from tokenspeed.gateway.turn import Turn
from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    joined,
)

_SECRET = secrets.token_bytes(32)  # of this process
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
    b'"delta":{"type":"%b","%b":%b}}\n\n'
)
_DELTA_NAMES: dict[type[Event], tuple[bytes, bytes]] = {
    Content: (b"text_delta", b"text"),
    Reasoning: (b"thinking_delta", b"thinking"),
    CallArguments: (b"input_json_delta", b"partial_json"),
}
_EMPTY: dict[type[Event], dict[str, Any]] = {
    Content: {"type": "text", "text": ""},
    Reasoning: {"type": "thinking", "thinking": "", "signature": ""},
}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class Message:
    """One answer of a model called `model`, as `stream` of events or `whole`.

    `kept_s`: for how long the client asked to keep its prompt. `silent`: it wants no answer, only
    its prompt cached. `omit`: it wants no thoughts, only their signature.
    """

    def __init__(
        self,
        turn: Turn,
        model: str,
        *,
        page_size: int,
        kept_s: float = 0.0,
        silent: bool = False,
        omit: bool = False,
    ) -> None:
        self._turn, self._choice = turn, turn.generation.choices[0]
        self._page_size, self._kept_s = page_size, kept_s
        self._silent, self._omit = silent, omit
        self._blocks = Blocks(omit)
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def chunk(self, choice: Choice) -> bytes:
        parts = []
        if not choice.begun:
            choice.begun = True
            rest: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
            message = self._head | rest | {"usage": self._usage()}
            parts.append(_event("message_start", message=message))
        if choice.answer is not None and not self._silent:
            parts.append(self._blocks.of(choice.answer.take()))
        return b"".join(parts)

    def closing(self) -> bytes:
        usage = self._usage()
        del usage["cache_creation"], usage["service_tier"]  # are of message_start alone
        end = _event("message_delta", delta=self._ending(), usage=usage)
        return self._blocks.close() + end + _STOP

    def failure(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + failure(error) + b"\n\n"

    def keep_alive(self) -> bytes:
        # Before message_start, which tells what was cached, clients expect no event.
        return _PING if self._choice.begun else b": keep-alive\n\n"

    def whole(self) -> bytes:
        answer = self._choice.answer
        content = [] if answer is None or self._silent else self._content(answer)
        rest = self._ending() | {"usage": self._usage()}
        return encode_json(self._head | {"content": content} | rest)

    def _content(self, answer: Answer) -> list[dict[str, Any]]:
        shown = [block for block in answer.blocks if block.kind == "call" or block.text.strip()]
        return [whole_block(block, self._omit) for block in shown]

    def _ending(self) -> dict[str, str | None]:
        """Why the answer ended."""
        found = self._choice.stop_reason
        if isinstance(found, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        reason = _REASONS.get(self._choice.finish_reason or "", "end_turn")
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Anthropic's three kinds of input, which add up to the prompt.

        Written to the cache, if the client asked for that, are the prompt's whole pages.
        """
        choice = self._choice
        num_prompt, num_read = len(choice.prompt_ids), choice.num_cached
        whole_pages = num_prompt // self._page_size * self._page_size
        num_written = max(whole_pages - num_read, 0) if self._kept_s else 0
        hour = self._kept_s >= 3600
        num_tokens = 0 if self._silent else choice.num_tokens
        num_thinking = 0 if self._silent else choice.num_reasoning
        tier = self._turn.request.caller.urgency.tier
        usage: dict[str, Any] = {
            "input_tokens": num_prompt - num_read - num_written,
            "cache_creation_input_tokens": num_written,
            "cache_read_input_tokens": num_read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": 0 if hour else num_written,
                "ephemeral_1h_input_tokens": num_written if hour else 0,
            },
            "output_tokens": num_tokens,
            "output_tokens_details": {"thinking_tokens": num_thinking},
            "service_tier": "priority" if tier == "priority" else "standard",
        }
        if (receipt := self._turn.receipt) is not None:
            usage["cache_receipt"] = receipt
        return usage


class Blocks:
    """The blocks of a stream, one after the other."""

    def __init__(self, omit: bool) -> None:
        self._omit = omit
        self._index = -1
        self._kind: type[Event] | None = None  # of the text that comes
        self._is_open = False
        self._blank = ""  # white space of a block that has not been opened
        self._thought: list[str] = []

    def of(self, events: Sequence[Event]) -> bytes:
        """The events, as bytes. Neighbours of a kind are one."""
        parts: list[bytes] = []
        for event in joined(events):
            match event:
                case Reasoning(text) | Content(text) | CallArguments(text):
                    parts.append(self._text(type(event), text))
                case CallStart(name, call_id):
                    parts.append(self.close())
                    block: dict[str, Any] = {
                        "type": "tool_use",
                        "id": call_id,
                        "name": name,
                        "input": {},
                    }
                    parts.append(self._open(CallArguments, block))
                case CallEnd():
                    parts.append(self.close())
        return b"".join(parts)

    def close(self) -> bytes:
        """Ends the block that is open, if one is."""
        end = b""
        if self._is_open:
            if self._kind is Reasoning:
                seal = {"type": "signature_delta", "signature": signature("".join(self._thought))}
                end = _event("content_block_delta", index=self._index, delta=seal)
            end += _event("content_block_stop", index=self._index)
        self._kind, self._is_open, self._blank, self._thought = None, False, "", []
        return end

    def _text(self, kind: type[Event], text: str) -> bytes:
        before = b""
        if kind is not self._kind:
            before = self.close()
            self._kind = kind
        if not self._is_open:
            self._blank += text
            if not self._blank.strip():
                return before
            text = self._blank
            before += self._open(kind, _EMPTY[kind])
        if kind is Reasoning:
            self._thought.append(text)
            if self._omit:
                return before
        return before + _DELTA % (self._index, *_DELTA_NAMES[kind], encode_json(text))

    def _open(self, kind: type[Event], block: dict[str, Any]) -> bytes:
        self._index += 1
        self._kind, self._is_open, self._blank = kind, True, ""
        return _event("content_block_start", index=self._index, content_block=block)


def whole_block(block: Block, omit: bool) -> dict[str, Any]:
    """A block of a whole message."""
    if block.kind == "call":
        about = {"type": "tool_use", "id": block.call_id, "name": block.name}
        return about | {"input": call_input(block.text)}
    if block.kind == "content":
        return {"type": "text", "text": block.text}
    text = "" if omit else block.text
    return {"type": "thinking", "thinking": text, "signature": signature(block.text)}


def call_input(arguments: str) -> msgspec.Raw:
    """The object that a call's arguments are; empty if they were cut or are none."""
    try:
        value = json.loads(arguments, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = None
    return msgspec.Raw(arguments.encode() if isinstance(value, dict) else b"{}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def signature(thought: str) -> str:
    """What a thinking block is signed with. Nobody need prove it: any thoughts are taken back."""
    return base64.b64encode(hmac.digest(_SECRET, thought.encode(), "sha256")).decode()


def _event(kind: str, **rest: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind} | rest))
