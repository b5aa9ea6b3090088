# SPDX-License-Identifier: MIT
"""What a streamed token costs, in Python calls: the same on any machine, however busy it is."""

import sys
from types import FrameType
from typing import Any

import pytest

from tests.gateway.harness import gateway
from tests.gateway.scripted import Scripted

SAID = {"messages": [{"role": "user", "content": "Say something."}]}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "Say something."}),
    "chat": ("/v1/chat/completions", SAID),
    "messages": ("/v1/messages", {**SAID, "model": "null"}),
    "responses": ("/v1/responses", {"input": "Say something.", "store": False}),
}
WORDS = "I look at the file and at the line of the error. " * 20


async def calls(dialect: str, num_tokens: int) -> int:
    """Calls of functions of gateway and text, and how often they are gone on with."""
    path, body = REQUESTS[dialect]
    limit = "max_output_tokens" if dialect == "responses" else "max_tokens"
    counted = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal counted
        name = frame.f_code.co_filename
        ours = "/tokenspeed/gateway/" in name or "/tokenspeed/text/" in name
        counted += event == "call" and ours

    async with gateway(echo=Scripted(WORDS)) as served:
        await served.post(path, {**body, limit: 1})  # finds out about the template
        sys.setprofile(count)
        try:
            reply = await served.post(path, {**body, limit: num_tokens, "stream": True})
        finally:
            sys.setprofile(None)
    assert reply.status_code == 200, reply.text
    return counted


@pytest.mark.parametrize(
    ("dialect", "most"), [("completions", 22), ("chat", 41), ("messages", 42), ("responses", 47)]
)
async def test_calls_of_a_token(dialect: str, most: int) -> None:
    few, many = [await calls(dialect, number) for number in (20, 120)]
    assert (many - few) / 100 <= most
