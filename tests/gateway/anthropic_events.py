# SPDX-License-Identifier: MIT
"""Streams of /v1/messages as a strict client reads them: framing, order, types, sum."""

import json
from typing import Any

import msgspec
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

ENCODER = msgspec.json.Encoder()
_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
_DELTAS = {
    "text": {"text_delta": "text"},
    "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    "tool_use": {"input_json_delta": "partial_json"},
}


def parse(text: str) -> list[dict[str, Any]]:
    """The events of a body; their names must be their types. Comments are left out."""
    if not text:
        return []
    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        assert name.startswith("event: "), block
        assert data.startswith("data: "), block
        events.append(json.loads(data[6:]))
        assert events[-1]["type"] == name[7:]
    return events


def conforms(value: Any, adapter: TypeAdapter[Any]) -> None:
    """Whether it is of the SDK's type, without a field that the type does not have."""
    _no_extras(adapter.validate_python(value, strict=True))


def whole_conforms(message: dict[str, Any]) -> None:
    conforms(message, TypeAdapter(Message))
    assert message["stop_reason"] is not None


def _no_extras(value: Any) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, (type(value), value.model_extra)
        for name in value.model_fields_set:
            _no_extras(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            _no_extras(item)


class Reader:
    """The state machine of a stream. `message` is what the events so far add up to."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {}
        self.state = "new"  # "between", "block", "ended", "over", "failed"
        self._json = ""

    def feed(self, event: dict[str, Any]) -> None:
        """Fails for an event that may not come now."""
        kind = event["type"]
        if kind == "ping":
            assert self.state in ("between", "block")
            return
        if kind == "error":
            assert self.state in ("between", "block")
            assert set(event["error"]) == {"type", "message"}
            self.state = "failed"
            return
        conforms(event, _EVENT)
        getattr(self, f"_{kind}")(event)

    def _message_start(self, event: dict[str, Any]) -> None:
        assert self.state == "new"
        self.state, self.message = "between", dict(event["message"])
        assert self.message["content"] == []
        assert self.message["stop_reason"] is None

    def _content_block_start(self, event: dict[str, Any]) -> None:
        assert self.state == "between"
        assert event["index"] == len(self.message["content"])
        block = event["content_block"]
        assert not any(block.get(key) for key in ("text", "thinking", "signature", "input"))
        self.message["content"].append(dict(block))
        self.state, self._json = "block", ""

    def _content_block_delta(self, event: dict[str, Any]) -> None:
        assert self.state == "block"
        assert event["index"] == len(self.message["content"]) - 1
        block, delta = self.message["content"][-1], event["delta"]
        key = _DELTAS[block["type"]][delta["type"]]
        assert delta[key]
        assert not (key == "thinking" and block["signature"]), "thoughts after their signature"
        if key == "partial_json":
            self._json += delta[key]
        else:
            block[key] += delta[key]

    def _content_block_stop(self, event: dict[str, Any]) -> None:
        assert self.state == "block"
        block = self.message["content"][-1]
        assert event["index"] == len(self.message["content"]) - 1
        if block["type"] == "tool_use":
            try:
                block["input"] = json.loads(self._json or "{}")
            except ValueError:
                block["input"] = {}  # it was cut
        else:
            assert block.get("text", "x").strip()
            assert block.get("signature", "x")
        self.state = "between"

    def _message_delta(self, event: dict[str, Any]) -> None:
        assert self.state == "between"
        assert event["delta"]["stop_reason"] is not None
        self.message |= event["delta"]
        for name, value in event["usage"].items():
            if name.endswith("input_tokens"):
                assert value == self.message["usage"][name]
        self.message["usage"] = self.message["usage"] | event["usage"]
        self.state = "ended"

    def _message_stop(self, event: dict[str, Any]) -> None:
        assert self.state == "ended"
        self.state = "over"


def joined(text: str) -> dict[str, Any]:
    """The message that a whole stream adds up to."""
    reader = Reader()
    for event in parse(text):
        reader.feed(event)
    assert reader.state == "over"
    return reader.message


def anonymous(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the ids that are made anew for each."""
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return {k: v for k, v in message.items() if k != "id"} | {"content": content}
