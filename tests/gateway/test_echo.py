# SPDX-License-Identifier: MIT
"""A session's answers come back as the ids that were sampled: every dialect, every family."""

import pytest

from benchmarks.null_engine import PAGE_SIZE
from tests.gateway.agents import ChatAgent, MessagesAgent, ResponsesAgent
from tests.gateway.harness import gateway
from tests.gateway.paged_script import SessionEngine, odd_ids
from tests.unit.chat_families import FAMILIES, Family

NUM_TURNS = 10
DEMO = FAMILIES["demo"]


def script(family: Family, turn: int) -> list[int]:
    """Thinking, then words on every third turn, else a call or two."""
    thought = f"Turn {turn}: what   now? é" if family.thinks else ""
    talks = turn % 3 == 2
    content = f"Turn {turn} is done.\n\nIt works, é.\n" if talks else f"I look at {turn}."
    if not talks and not family.mixed:
        content = ""
    calls = [] if talks else [("read_file", {"path": f"a/{turn}.py", "n": 1.0})]
    if turn % 3 == 1 and family.parallel:
        calls.append(("run_tests", {"path": "", "n": 2.5}))
    return odd_ids(family.tokenizer(), family.write(thought, content, calls))


async def run_session(g, agent, num_turns=NUM_TURNS, **extra):
    for turn in range(num_turns):
        reply = await g.post(agent.path, agent.body() | extra)
        assert reply.status_code == 200, reply.text
        agent.take(reply.json(), turn)


def family_gateway(family: Family, echo: SessionEngine, **options):
    return gateway(
        echo=echo,
        template=family.template,
        tokenizer=family.tokenizer(),
        config={"answer_format": None},
        **options,
    )


def whole_pages(total: list[int]) -> int:
    """Tokens of a turn that are in whole pages; its last token has not been computed on."""
    return (len(total) - 1) // PAGE_SIZE * PAGE_SIZE


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("agent", [ChatAgent, MessagesAgent, ResponsesAgent])
async def test_ten_turns_are_continued_token_by_token(agent, name):
    family, asking = FAMILIES[name], agent()
    echo = SessionEngine([script(family, turn) for turn in range(NUM_TURNS)])
    async with family_gateway(family, echo) as g:
        await run_session(g, asking)
        assert g.service.prompts.history.num_hits == NUM_TURNS - 1
    assert len(echo.prompts) == NUM_TURNS
    for before, prompt in zip(echo.totals, echo.prompts[1:], strict=False):
        assert prompt[: len(before) - 1] == before[:-1]
        # What ended an answer of gpt-oss is written otherwise once it is history.
        assert name == "harmony" or prompt[len(before) - 1] == before[-1]
    assert asking.cached == [0, *map(whole_pages, echo.totals[:-1])]


async def test_without_history_the_same_session_loses_its_cache():
    """The template of Qwen 3 leaves old thoughts out, and odd tokens are never made again."""
    family, asking = FAMILIES["qwen3"], ChatAgent()
    echo = SessionEngine([script(family, turn) for turn in range(NUM_TURNS)])
    async with family_gateway(family, echo, history_bytes=0) as g:
        await run_session(g, asking)
    lost = zip(asking.cached[1:], echo.totals, strict=False)
    assert sum(cached < whole_pages(total) for cached, total in lost) > NUM_TURNS // 2


@pytest.mark.parametrize("agent", [ChatAgent, MessagesAgent, ResponsesAgent])
async def test_streamed_answers_are_remembered_too(agent):
    asking = agent()
    echo = SessionEngine([script(DEMO, turn) for turn in (0, 0, 1)])
    async with family_gateway(DEMO, echo) as g:
        body = asking.body()
        await g.post(asking.path, body | {"stream": True})
        streamed = len(g.service.prompts.history)
        await run_session(g, asking, 2)
    assert streamed == 1
    assert echo.prompts[2][: len(echo.totals[1])] == echo.totals[1]


async def test_answers_cut_by_their_limit_are_ended_for_them():
    family, asking = FAMILIES["qwen3"], ChatAgent()
    tokenizer = family.tokenizer()
    words = odd_ids(tokenizer, "one two three four")
    echo = SessionEngine([words, script(family, 2)])
    async with family_gateway(family, echo) as g:
        await run_session(g, asking, 2, max_tokens=7)
    before, prompt = echo.totals[0], echo.prompts[1]
    assert prompt[: len(before)] == before
    rest = tokenizer.decode(prompt[len(before) :], skip_special_tokens=False)
    assert rest == "<|im_end|>\n<|im_start|>user\ngo on 0<|im_end|>\n<|im_start|>assistant\n"


async def test_every_choice_is_remembered():
    echo = SessionEngine([odd_ids(DEMO.tokenizer(), f"answer {i}<|end|>") for i in range(3)])
    asking = ChatAgent()
    async with family_gateway(DEMO, echo) as g:
        reply = (await g.post(asking.path, asking.body() | {"n": 2})).json()
        reply["choices"].reverse()
        asking.take(reply, 0)
        await run_session(g, asking, 1)
        assert len(g.service.prompts.history) == 3
    second = next(t for t in echo.totals if DEMO.tokenizer().decode(t).endswith("answer 1"))
    assert echo.prompts[2][: len(second)] == second


@pytest.mark.parametrize("change", ["content", "arguments", "thought", "system", "tenant"])
async def test_what_is_changed_is_rendered_anew(change):
    asking = ChatAgent()
    echo = SessionEngine([script(DEMO, 1), script(DEMO, 2)])
    keys = ("a" * 20, "b" * 20)
    headers = [{"authorization": f"Bearer {key}"} for key in keys]
    async with family_gateway(DEMO, echo, keys=keys) as g:
        reply = await g.post(asking.path, asking.body(), headers=headers[0])
        asking.take(reply.json(), 1)
        answer = asking.messages[2]
        if change == "content":
            answer["content"] += "!"
        elif change == "arguments":
            answer["tool_calls"][0]["function"]["arguments"] = '{"path": "b.py", "n": 1}'
        elif change == "thought":
            answer["reasoning_content"] = "Something else."
        elif change == "system":
            asking.messages[0]["content"] += "!"
        who = headers[change == "tenant"]
        assert (await g.post(asking.path, asking.body(), headers=who)).status_code == 200
        assert g.service.prompts.history.num_hits == 0
    assert echo.prompts[1][: len(echo.totals[0])] != echo.totals[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_receipt_says_where_a_session_parted(stream):
    echo = SessionEngine([script(DEMO, turn) for turn in (2, 0, 1, 2)])
    asking = ChatAgent()
    receipts = []
    async with family_gateway(DEMO, echo) as g:
        for turn in range(3):
            if turn == 2:
                asking.messages[1] = {"role": "user", "content": "Fix the documentation."}
            body = asking.body() | {"cache_receipt": True, "user": "u", "prompt_cache_key": "s1"}
            if stream:
                body |= {"stream_options": {"include_usage": True}}
                usage = (await g.events(asking.path, body))[-1]["usage"]
                message = {"content": f"Turn {turn}", "reasoning_content": None}
                reply = {"choices": [{"message": message}], "usage": usage}
            else:
                reply = (await g.post(asking.path, body)).json()
            receipts.append(reply["usage"]["cache_receipt"])
            asking.take(reply, turn)
        plain = await g.post(asking.path, asking.body() | {"max_tokens": 1})
    assert receipts[0]["matched"] == receipts[0]["expected"] == 0
    assert receipts[0]["first_divergent_token"] is None
    if not stream:
        assert receipts[1]["expected"] == len(echo.totals[0])
        assert receipts[1]["matched"] == whole_pages(echo.totals[0])
        assert receipts[1]["by_tier"] == {"device": receipts[1]["matched"], "host": 0}
    parted = receipts[2]["first_divergent_token"]
    assert echo.prompts[2][:parted] == echo.totals[1][:parted]
    assert echo.prompts[2][parted] != echo.totals[1][parted]
    assert receipts[2]["region"] == "message 1"
    assert receipts[2]["expected"] == parted
    assert "cache_receipt" not in plain.json()["usage"]


async def test_calls_of_custom_tools_come_back():
    said = DEMO.write("", "", [("patch", {"input": 'a\n"é"'})])
    echo = SessionEngine([odd_ids(DEMO.tokenizer(), said), script(DEMO, 2)])
    messages = [{"role": "user", "content": "patch it"}]
    body = {"tools": [{"type": "custom", "custom": {"name": "patch"}}]}
    async with family_gateway(DEMO, echo) as g:
        reply = (await g.post(ChatAgent.path, body | {"messages": messages})).json()
        answer = reply["choices"][0]["message"]
        assert answer["tool_calls"][0]["custom"]["input"] == 'a\n"é"'
        call_id = answer["tool_calls"][0]["id"]
        messages += [answer, {"role": "tool", "tool_call_id": call_id, "content": "ok"}]
        again = await g.post(ChatAgent.path, body | {"messages": messages})
    assert again.status_code == 200, again.text
    assert echo.prompts[1][: len(echo.totals[0])] == echo.totals[0]
