# SPDX-License-Identifier: MIT
"""Anthropic's messages as the model's conversation, and every way in which they can be wrong."""

import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.scripted import Scripted
from tokenspeed.errors import RequestError
from tokenspeed.gateway.messages_input import Input
from tokenspeed.gateway.messages_schema import Notes
from tokenspeed.gateway.messages_tools import Tools

PATH = "/v1/messages"
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": 1, "a": "é"}}
DONE = {"type": "tool_result", "tool_use_id": "t1", "content": "42"}


def text(said, **more):
    return {"type": "text", "text": said, **more}


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def read(*messages, system=None, tools=()):
    notes = Notes()
    made = Input(notes, Tools(list(tools), notes))
    made.read(system, list(messages))
    return made, notes


def rendered(*messages, system=None):
    return read(*messages, system=system)[0].messages


def test_a_whole_exchange():
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "zzz"}
    assert rendered(
        user(text("q")),
        assistant(thought, hidden, text("I "), text("look."), USE),
        user(DONE, text("and?")),
        system="Be brief.",
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"b":1,"a":"é"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "and?"},
    ]


def test_neighbours_of_a_role_are_one_turn_and_system_messages_stay():
    made = rendered(
        {"role": "user", "content": "a"},
        user(text("b"), text("")),
        {"role": "system", "content": "reminder"},
        {"role": "system", "content": [text("another", cache_control={"type": "ephemeral"})]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        assistant(text("e"), USE),
        {"role": "system", "content": "late"},
        user(text("before"), DONE),
        user(text("f")),
        system=[text("one"), text(""), text("two")],
    )
    assert [(m["role"], m["content"]) for m in made] == [
        ("system", [text("one"), text("two")]),
        ("user", [text("a"), text("b")]),
        ("system", "reminder"),
        ("system", "another"),
        ("user", "c"),
        ("assistant", "de"),
        ("system", "late"),
        ("tool", "42"),
        ("user", [text("before"), text("f")]),
    ]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"content": "out"}, "out"),
        ({}, ""),
        ({"content": ""}, ""),
        ({"content": []}, ""),
        ({"content": [text("a"), text("b")]}, [text("a"), text("b")]),
        ({"content": "no such file", "is_error": True}, [text("Error:"), text("no such file")]),
        ({"content": "Error: no such file", "is_error": True}, "Error: no such file"),
        ({"is_error": True}, "Error:"),
        ({"content": [{"type": "tool_reference", "tool_name": "g"}]}, "Tool loaded: g"),
        (
            {"content": [{"type": "image", "source": {}}]},
            "[An image, which this model cannot see.]",
        ),
        (
            {
                "content": [
                    {
                        "type": "search_result",
                        "title": "T",
                        "source": "s",
                        "content": [text("x"), text("y")],
                    }
                ]
            },
            "T\ns\nx\ny",
        ),
    ],
)
def test_results_of_tools(result, expected):
    block = {"type": "tool_result", "tool_use_id": "t1"} | result
    assert rendered(user(text("q")), assistant(USE), user(block))[-1]["content"] == expected


def test_documents_of_text():
    plain = {"type": "text", "media_type": "text/plain", "data": "body"}
    inner = {"type": "content", "content": [text("x"), text("y")]}
    made = rendered(
        user(
            {"type": "document", "source": plain, "title": "T", "context": "C"},
            {"type": "document", "source": inner, "title": None},
        )
    )
    assert made[0]["content"] == [text("T\nC\nbody"), text("x\ny")]


def test_blocks_of_hosted_tools_are_left_out_and_named():
    made, notes = read(
        user(text("q")),
        assistant(
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
            text("found"),
        ),
        user(text("more")),
    )
    assert made.messages[1] == {"role": "assistant", "content": "found"}
    assert notes.header() == {
        "x-tokenspeed-ignored": "messages.1.content.0 server_tool_use,"
        " messages.1.content.1 web_search_tool_result"
    }


def test_ids_may_be_used_again_in_a_later_turn():
    """Some models number their calls anew in every turn."""
    made = rendered(user(text("q")), *[assistant(USE), user(DONE)] * 2)
    assert [m["role"] for m in made] == ["user", "assistant", "tool", "assistant", "tool"]


def test_the_longest_cache_control_counts():
    five, hour = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}
    inner = DONE | {"content": [text("x", cache_control=hour)]}
    turns = [user(text("q", cache_control=five)), assistant(USE)]
    assert read(*turns, user(DONE))[1].retention_s == 300
    assert read(*turns, user(inner))[1].retention_s == 3600
    assert read(user(text("q")), system=[text("s", cache_control=hour)])[1].retention_s == 3600
    assert read(user(text("q")))[1].retention_s == 0


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
PDF = {"type": "document", "source": {"type": "base64", "data": ""}}
WRONG = [
    ([], "messages"),
    ([5], "messages.0"),
    ([{"content": "x"}], "messages.0.role"),
    ([{"role": "developer", "content": "x"}], "messages.0.role"),
    ([{"role": ["user"], "content": "x"}], "messages.0.role"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "user", "content": ""}], "messages.0"),
    ([user()], "messages.0"),
    ([user(text(""))], "messages.0"),
    ([{"role": "system", "content": ""}], "messages.0"),
    ([user(5)], "messages.0.content.0"),
    ([user({})], "messages.0.content.0.type"),
    ([user({"type": "hologram"})], "messages.0.content.0.type"),
    ([user(text("a"), {"type": ["text"]})], "messages.0.content.1.type"),
    ([user(USE)], "messages.0.content.0.type"),
    ([user({"type": "tool_reference", "tool_name": "f"})], "messages.0.content.0.type"),
    ([user({"type": "text"})], "messages.0.content.0.text"),
    ([user(text("a", cache_control=5))], "messages.0.content.0.cache_control"),
    ([user(text("a", cache_control={"type": "x"}))], "messages.0.content.0.cache_control"),
    (
        [user(text("a", cache_control={"type": "ephemeral", "ttl": "soon"}))],
        "messages.0.content.0.cache_control",
    ),
    ([user(IMAGE)], "messages.0.content.0"),
    ([user(PDF)], "messages.0.content.0.source"),
    ([user({"type": "document"})], "messages.0.content.0.source"),
    ([user(text("q")), assistant({"type": "thinking"})], "messages.1.content.0.thinking"),
    ([user(text("q")), assistant(IMAGE)], "messages.1.content.0.type"),
    ([user(text("q")), assistant(USE | {"id": ""})], "messages.1.content.0.id"),
    ([user(text("q")), assistant(USE | {"input": "{}"})], "messages.1.content.0.input"),
    ([user(text("q")), assistant(USE | {"name": None})], "messages.1.content.0.name"),
    ([user(text("q")), assistant(USE, USE)], "messages.1.content.1.id"),
    ([user(text("q")), assistant(USE), assistant(USE)], "messages.2.content.0.id"),
    ([user(DONE)], "messages.0.content.0"),
    ([user(text("q")), assistant(USE), user(DONE, DONE)], "messages.2.content.1"),
    (
        [user(text("q")), assistant(USE), user(DONE | {"tool_use_id": "t2"})],
        "messages.2.content.0",
    ),
    (
        [user(text("q")), assistant(USE), user(DONE), assistant(text("a")), user(DONE)],
        "messages.4.content.0",
    ),
    (
        [user(text("q")), assistant(USE), user(DONE | {"content": [USE]})],
        "messages.2.content.0.content.0.type",
    ),
    (
        [user(text("q")), assistant(USE), user(DONE | {"content": 5})],
        "messages.2.content.0.content",
    ),
    ([user(text("q")), assistant(USE)], "messages"),
    ([user(text("q")), assistant(text("so "))], "messages"),
    ([user(text("q")), assistant({"type": "thinking", "thinking": "hm"})], "messages"),
    ([{"role": "system", "content": [text("")]}], "messages"),
]


@pytest.mark.parametrize(("messages", "at"), WRONG)
def test_mistakes_name_their_place(messages, at):
    with pytest.raises(RequestError) as found:
        read(*messages)
    assert found.value.field == at
    assert str(found.value).startswith(f"{at}: ")


async def test_the_answer_goes_on_with_the_assistants_last_message():
    body = {
        "model": "m",
        "max_tokens": 9,
        "messages": [
            {"role": "user", "content": "JSON please"},
            {"role": "assistant", "content": '{"a":'},
        ],
    }
    async with gateway(echo=Scripted(" 1}")) as g:
        reply = await g.post(PATH, body)
        counted = await g.post(f"{PATH}/count_tokens", body)
        prompt = TOKENIZER.decode(g.echo.prompts[0], skip_special_tokens=False)
    assert reply.json()["content"] == [text(" 1}")]
    assert prompt.endswith('<|end|><|assistant|>{"a":')
    assert counted.json()["input_tokens"] == reply.json()["usage"]["input_tokens"]
    async with gateway(template="{{ messages[0].content }}") as g:
        reply = await g.post(PATH, body)
    assert reply.status_code == 400
    assert "cannot go on" in reply.json()["error"]["message"]


async def test_mistakes_are_400_in_the_dialect():
    async with gateway() as g:
        for messages, _ in WRONG:
            body = {"model": "m", "max_tokens": 1, "messages": messages}
            for path, stream in ((PATH, False), (PATH, True), (f"{PATH}/count_tokens", False)):
                reply = await g.post(path, body | {"stream": stream})
                error = reply.json()
                assert reply.status_code == 400, reply.text
                assert error["type"] == "error"
                assert error["error"]["type"] == "invalid_request_error"
                assert error["request_id"] == reply.headers["request-id"]
