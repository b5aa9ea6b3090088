# SPDX-License-Identifier: MIT
"""Text completions, models, tokens and the other small routes, in process."""

import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tokenspeed import __version__

TEXT = "/v1/completions"
WORDS = "def parse(x): return 1"
IDS = TOKENIZER.encode(WORDS)


@pytest.mark.parametrize(
    ("prompt", "number"),
    [(WORDS, 1), (IDS, 1), ([WORDS, "x = 2"], 2), ([IDS, IDS[:3]], 2), ([WORDS, IDS], 2)],
)
async def test_prompts_in_every_shape(prompt, number):
    async with gateway() as g:
        body = {"prompt": prompt, "max_tokens": len(IDS), "n": 2}
        whole = (await g.post(TEXT, body)).json()
        events = await g.events(TEXT, body)
    choices = whole["choices"]
    assert [c["index"] for c in choices] == list(range(2 * number))
    assert choices[0]["text"] == choices[1]["text"] == WORDS
    streamed = [""] * len(choices)
    for event in events:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == [c["text"] for c in choices]


async def test_default_length_is_sixteen():
    async with gateway() as g:
        reply = (await g.post(TEXT, {"prompt": WORDS})).json()
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["finish_reason"] == "length"


async def test_echo_repeats_the_prompt():
    async with gateway() as g:
        body = {"prompt": WORDS, "max_tokens": len(IDS), "echo": True}
        whole = (await g.post(TEXT, body)).json()["choices"][0]["text"]
        events = await g.events(TEXT, body)
    assert whole == WORDS + WORDS
    assert "".join(e["choices"][0]["text"] for e in events) == whole


async def test_logprobs_shape():
    async with gateway() as g:
        body = {"prompt": WORDS, "max_tokens": 3, "logprobs": 2}
        whole = (await g.post(TEXT, body)).json()["choices"][0]
        events = await g.events(TEXT, body)
        as_ids = await g.post(TEXT, {**body, "return_tokens_as_token_ids": True})
    shown = whole["logprobs"]
    assert "".join(shown["tokens"]) == whole["text"]
    assert shown["token_logprobs"] == [-0.5] * 3
    assert all(len(top) == 3 for top in shown["top_logprobs"])
    lengths = [len(token) for token in shown["tokens"]]
    assert shown["text_offset"] == [sum(lengths[:i]) for i in range(3)]
    streamed = [t for e in events for t in e["choices"][0]["logprobs"]["text_offset"]]
    assert streamed == shown["text_offset"]
    tokens = as_ids.json()["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"token_id:{i}" for i in IDS[:3]]


async def test_token_ids_in_and_out():
    async with gateway() as g:
        body = {"prompt": IDS, "max_tokens": 2, "return_token_ids": True}
        whole = (await g.post(TEXT, body)).json()["choices"][0]
        events = await g.events(TEXT, body)
    assert whole["prompt_token_ids"] == events[0]["choices"][0]["prompt_token_ids"] == IDS
    assert whole["token_ids"] == IDS[:2]
    assert [i for e in events for i in e["choices"][0]["token_ids"]] == IDS[:2]


async def test_server_without_a_tokenizer_speaks_ids():
    async with gateway(tokenizer=None) as g:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True}
        whole = (await g.post(TEXT, body)).json()["choices"][0]
        refused = await g.post(TEXT, {"prompt": "text"})
        chat = await g.post("/v1/chat/completions", {"messages": [{"role": "user"}]})
        stop = await g.post(TEXT, {"prompt": [5], "stop": "x"})
    assert whole["token_ids"] == [5, 6, 7, 5]
    assert whole["text"] == ""
    assert refused.status_code == chat.status_code == stop.status_code == 400
    assert stop.json()["error"]["param"] == "stop"


async def test_models_and_version():
    async with gateway() as g:
        listed = (await g.http.get("/v1/models")).json()
        one = await g.http.get("/v1/models/org/alias")
        none = await g.http.get("/v1/models/other")
        version = (await g.http.get("/version")).json()
    assert [d["id"] for d in listed["data"]] == ["null", "org/alias"]
    assert all(d["max_model_len"] == 4096 for d in listed["data"])
    assert one.json() == listed["data"][1]
    assert none.status_code == 404
    assert none.json()["error"]["code"] == "model_not_found"
    assert version == {"version": __version__}


async def test_tokenize_and_back():
    async with gateway() as g:
        made = (await g.post("/tokenize", {"prompt": "héllo", "return_token_strs": True})).json()
        back = (await g.post("/detokenize", {"tokens": made["tokens"]})).json()
        chat = await g.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})
        both = await g.post("/tokenize", {"prompt": "x", "messages": []})
        wrong = await g.post("/detokenize", {"tokens": [-1]})
        many = await g.post("/detokenize", {"tokens": [1] * 300_000})
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == 4096
    assert back == {"prompt": "héllo"}
    assert chat.json()["count"] > 1
    assert both.json()["error"]["param"] == "prompt"
    assert wrong.json()["error"]["param"] == many.json()["error"]["param"] == "tokens"
