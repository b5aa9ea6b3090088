# SPDX-License-Identifier: MIT
"""`Output`: events of an answer as the items and events of a response. Knows no HTTP, no engine.

The whole response is what the events leave behind, so a stream and a whole answer cannot differ:

    created, in_progress, (item added, [part added], deltas, done, [part done], item done)*, last
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from tokenspeed.gateway.app import encode_json
from tokenspeed.gateway.responses_seal import seal
from tokenspeed.gateway.responses_tools import ClientTool
from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    joined,
)
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.custom_input import InputText

Item = dict[str, Any]
_FUNCTION, _CUSTOM = "function_call", "custom_tool_call"
_TEXT_EVENTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}
_CALL_EVENTS = {
    _FUNCTION: ("response.function_call_arguments", "arguments"),
    _CUSTOM: ("response.custom_tool_call_input", "input"),
}


class Output:
    """One response as it comes about. Methods return the events that they make, in order.

    `head` holds the fields of the response that never change.
    """

    def __init__(self, head: dict[str, Any], conversation: Conversation, seals: bool) -> None:
        self.id: str = head["id"]
        self.status = "in_progress"
        self.items: list[Item] = []
        self._head, self._conversation, self._seals = head, conversation, seals
        self._last: dict[str, Any] = {}  # fields that the end sets
        self._open: Item | None = None  # the last item, unless it is done
        self._parts: list[str] = []  # its text
        self._input: InputText | None = None  # of a custom tool's call
        self._own: ClientTool | None = None  # whose call is an item of its own type
        self._around = b"", b"", b""  # the text of a delta of the item in work, and its number
        self._made: list[bytes] = []
        self._next = 0

    def response(self) -> dict[str, Any]:
        """The response object as it stands."""
        if self._open is not None:
            self._set_text(self._open, "".join(self._parts))
        return {
            **self._head,
            "status": self.status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": self.items,
            "usage": None,
            **self._last,
        }

    def opening(self) -> list[bytes]:
        """The first two events."""
        for kind in ("response.created", "response.in_progress"):
            self._event(kind, response=self.response())
        return self._take()

    def push(self, events: Sequence[Event]) -> list[bytes]:
        """What the answer has gained."""
        for event in joined(events):
            match event:
                case Reasoning(text):
                    self._text("reasoning", text)
                case Content(text):
                    self._text("message", text)
                case CallStart(name, call_id):
                    self._start_call(name, call_id or "")
                case CallArguments(text):
                    self._delta(text if self._input is None else self._input.push(text))
                case CallEnd(complete):
                    if self._input is not None:
                        self._delta(self._input.finish())
                    self._close("completed" if complete else "incomplete")
        return self._take()

    def finish(self, usage: dict[str, Any], *, cut: bool) -> list[bytes]:
        """The end. `cut`: there was room for no more tokens."""
        status = "incomplete" if cut else "completed"
        self._close(status)
        self.status, self._last = status, {"usage": usage}
        if cut:
            self._last["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._last["completed_at"] = int(time.time())
        self._event(f"response.{status}", response=self.response())
        return self._take()

    def fail(self, code: str, message: str) -> list[bytes]:
        """The end of a response that could not be finished."""
        self._stop("failed")
        self._last = {"error": {"code": code, "message": message}}
        self._event("error", code=code, message=message, param=None)
        self._event("response.failed", response=self.response())
        return self._take()

    def cancel(self) -> None:
        """The end by the client's wish, which has no event."""
        self._stop("cancelled")

    def _stop(self, status: str) -> None:
        self.status = status
        if self._open is not None:
            self._set_text(self._open, "".join(self._parts))
            self._open["status"] = "incomplete"
            self._open = None

    def _text(self, kind: str, text: str) -> None:
        if self._open is None or self._open["type"] != kind:
            self._close("completed")
            self._start_text(kind)
        self._delta(text)

    def _start_text(self, kind: str) -> None:
        if kind == "reasoning":
            item: Item = {"id": _new("rs"), "type": kind, "summary": [], "content": []}
            item |= {"encrypted_content": None, "status": "in_progress"}
        else:
            item = {"id": _new("msg"), "type": kind, "status": "in_progress"}
            item |= {"role": "assistant", "content": []}
        self._add(item)
        self._part("added", _part(kind, ""))

    def _start_call(self, name: str, call_id: str) -> None:
        self._close("completed")
        tool = self._conversation.tool(name)
        if isinstance(tool, ClientTool):
            self._own = tool
            item = {"id": _new("tool"), "type": tool.item, "status": "in_progress"}
            self._add({**item, "call_id": call_id, **tool.fields("")})
            return
        custom = tool is not None and tool.custom
        kind = _CUSTOM if custom else _FUNCTION
        item = {"id": _new("ctc" if custom else "fc"), "type": kind, "status": "in_progress"}
        item |= {"call_id": call_id, "name": name, _CALL_EVENTS[kind][1]: ""}
        if tool is not None and tool.namespace is not None:
            item |= {"name": tool.own_name or name, "namespace": tool.namespace}
        self._input = InputText() if custom else None
        self._add(item)

    def _add(self, item: Item) -> None:
        self.items.append(item)
        self._open, self._parts = item, []
        self._event("response.output_item.added", output_index=self._index, item=item)
        self._around = _around_delta(item, self._index)

    def _delta(self, text: str) -> None:
        if not text or self._open is None:
            return
        self._parts.append(text)
        if self._own is not None:
            return
        front, middle, end = self._around
        self._made.append(b"%b%d%b%b%b" % (front, self._next, middle, encode_json(text), end))
        self._next += 1

    def _close(self, status: str) -> None:
        """The item in work is done."""
        item, text = self._open, "".join(self._parts)
        if item is None:
            return
        place: dict[str, Any] = {"item_id": item["id"], "output_index": self._index}
        kind, item["status"] = item["type"], status
        self._set_text(item, text)
        if self._own is not None:
            pass  # nothing is said of it before it is done
        elif kind in _CALL_EVENTS:
            event, key = _CALL_EVENTS[kind]
            extra = {"name": item["name"]} if kind == _FUNCTION else {}
            self._event(f"{event}.done", **place, **extra, **{key: text})
        else:
            self._event(
                f"{_TEXT_EVENTS[kind]}.done", **place, content_index=0, text=text, **_extra(kind)
            )
            self._part("done", _part(kind, text))
        if kind == "reasoning" and self._seals:
            item["encrypted_content"] = seal(text)
        self._event("response.output_item.done", output_index=self._index, item=item)
        self._open, self._parts, self._input, self._own = None, [], None, None

    def _set_text(self, item: Item, text: str) -> None:
        if self._own is not None:
            item |= self._own.fields(text)
        elif item["type"] in _CALL_EVENTS:
            item[_CALL_EVENTS[item["type"]][1]] = text
        else:
            item["content"] = [_part(item["type"], text)]

    def _part(self, what: str, part: Item) -> None:
        item = self.items[-1]
        place: dict[str, Any] = {"item_id": item["id"], "output_index": self._index}
        self._event(f"response.content_part.{what}", **place, content_index=0, part=part)

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _event(self, kind: str, **fields: Any) -> None:
        """Encoded at once: items change as they grow."""
        body = encode_json({"type": kind, "sequence_number": self._next, **fields})
        self._made.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), body))
        self._next += 1

    def _take(self) -> list[bytes]:
        made, self._made = self._made, []
        return made


def _new(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def _around_delta(item: Item, index: int) -> tuple[bytes, bytes, bytes]:
    """The parts of an item's deltas that stay: up to the number, up to the text, after it."""
    kind = item["type"]
    event = _CALL_EVENTS[kind][0] if kind in _CALL_EVENTS else _TEXT_EVENTS.get(kind, kind)
    front = f'event: {event}.delta\ndata: {{"type":"{event}.delta","sequence_number":'
    place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
    if kind in _TEXT_EVENTS:
        place["content_index"] = 0
    extra = encode_json(_extra(kind))[1:]  # with the brace that ends the event
    middle = b"," + encode_json(place)[1:-1] + b',"delta":'
    return front.encode(), middle, (b"," if extra != b"}" else b"") + extra + b"\n\n"


def _extra(kind: str) -> dict[str, list[Any]]:
    return {"logprobs": []} if kind == "message" else {}


def _part(kind: str, text: str) -> Item:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
