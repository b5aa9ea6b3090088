# SPDX-License-Identifier: MIT
"""What a stream of /v1/responses must be: every event's type, their order, and the whole of it."""

import json
from typing import Any

from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

_EVENT = TypeAdapter(ResponseStreamEvent)
_RESPONSE, _ITEMS = TypeAdapter(Response), TypeAdapter(ResponseItemList)
_TEXTS = {
    "message": ("output_text", "output_text"),
    "reasoning": ("reasoning_text", "reasoning_text"),
}
_CALLS = {
    "function_call": ("function_call_arguments", "arguments"),
    "custom_tool_call": ("custom_tool_call_input", "input"),
}
_LAST = {"response.completed", "response.incomplete", "response.failed"}


def parse(text: str) -> list[dict[str, Any]]:
    """The events of a stream's text, each one checked against the SDK's type."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    events = []
    for block in blocks:
        name, data = block.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        event = json.loads(data[6:])
        assert event["type"] == name[7:]
        _EVENT.validate_python(event)
        events.append(event)
    return events


def check_response(body: dict[str, Any]) -> dict[str, Any]:
    """A response object, every field of the SDK's type that it must have and some that it may."""
    _RESPONSE.validate_python(body)
    extra = body.keys() - Response.model_fields.keys() - {"store"}
    assert not extra, extra
    for item in body["output"]:
        assert item["status"] in ("in_progress", "completed", "incomplete")
    return body


def check_list(body: dict[str, Any]) -> dict[str, Any]:
    """A list of input items."""
    _ITEMS.validate_python(body)
    return body


def check_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs the state machine over a whole stream; the final response object."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    for event in events[:2]:
        assert event["response"]["status"] == "in_progress"
        assert event["response"]["output"] == []
    rest, items = events[2:], []
    while rest[0]["type"] == "response.output_item.added":
        rest = _check_item(rest, items)
    if rest[0]["type"] == "error":
        assert rest[1]["type"] == "response.failed"
        rest = rest[1:]
    assert [event["type"] for event in rest] == [rest[0]["type"]]
    assert rest[0]["type"] in _LAST
    final = check_response(rest[0]["response"])
    assert rest[0]["type"] == f"response.{final['status']}"
    assert final["output"] == items
    assert final["id"] == events[0]["response"]["id"]
    return final


def _check_item(events: list[dict[str, Any]], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consumes one item's events; returns those after it."""
    first, index = events[0], len(items)
    item = first["item"]
    assert first["output_index"] == index
    assert item["status"] == "in_progress"
    own = [e for e in events[1:] if e.get("item_id", (e.get("item") or {}).get("id")) == item["id"]]
    assert events[1 : 1 + len(own)] == own, "items must not interleave"
    assert all(event["output_index"] == index for event in own)
    cut = not own or own[-1]["type"] != "response.output_item.done"
    kinds = [event["type"].removeprefix("response.") for event in own]
    if item["type"] in ("tool_search_call", "local_shell_call"):
        assert kinds == ["output_item.done"]
        items.append(own[0]["item"])
        return events[2:]
    if item["type"] in _TEXTS:
        text = _check_text(item["type"], kinds, own, cut)
        key = None
    else:
        event, key = _CALLS[item["type"]]
        assert item[key] == ""
        text = "".join(e["delta"] for e in own if "delta" in e)
        ending = [] if cut else [f"{event}.done", "output_item.done"]
        num_deltas = len(kinds) - len(ending)
        assert kinds == [f"{event}.delta"] * num_deltas + ending
        assert cut or own[-2][key] == text
    done = dict(item) if cut else own[-1]["item"]
    if cut:
        done["status"] = "incomplete"
        assert events[1 + len(own)]["type"] == "error", "an item is left open by an error alone"
    if key is not None:
        done[key] = text
    else:
        extra = {"annotations": [], "logprobs": []} if item["type"] == "message" else {}
        part = {"type": _TEXTS[item["type"]][0], "text": text, **extra}
        assert cut or done["content"] == [part]
        done["content"] = [part]
    items.append(done)
    return events[1 + len(own) :]


def _check_text(kind: str, kinds: list[str], own: list[dict[str, Any]], cut: bool) -> str:
    name = _TEXTS[kind][1]
    ending = [] if cut else [f"{name}.done", "content_part.done", "output_item.done"]
    num_deltas = len(kinds) - 1 - len(ending)
    assert num_deltas >= 1, "an item of text has text"
    assert kinds == ["content_part.added", *[f"{name}.delta"] * num_deltas, *ending]
    assert own[0]["part"]["text"] == ""
    text = "".join(event["delta"] for event in own if "delta" in event)
    if not cut:
        assert own[-3]["text"] == own[-2]["part"]["text"] == text
    return text


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs from one run to the next."""
    changing = {"id", "created_at", "completed_at", "output"}
    items = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")}
        for item in response["output"]
    ]
    return {k: v for k, v in response.items() if k not in changing} | {"output": items}
