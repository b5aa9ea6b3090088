# SPDX-License-Identifier: MIT
"""Prompts: regions of tokens, limits, what is logged, who shares what."""

import logging

import pytest

from tests.unit.chat_families import FAMILIES
from tests.unit.test_history_families import TOOLS, prompts_of
from tokenspeed.errors import ContextLengthError, RequestError
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.history_keys import Spoken

DEMO = FAMILIES["demo"]
TOKENIZER = DEMO.tokenizer()
MESSAGES = [
    {"role": "system", "content": "You are an agent, and a good one."},
    {"role": "user", "content": "Fix the tests, all of them."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "run_tests", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "two failed é 🙂"},
    {"role": "user", "content": "Fix the tests, all of them."},
]


def said(prompts, prompt, text="two"):
    output = TOKENIZER.encode(text + "<|end|>", add_special_tokens=False)
    prompts.record(prompt, Spoken((text,)), output, output[-1])


def test_every_token_has_its_region():
    conversation = Conversation(MESSAGES, TOOLS)
    prompt = prompts_of(DEMO).make(conversation)
    regions = [prompt.region_of(i, TOKENIZER) for i in range(len(prompt.ids))]
    order = list(dict.fromkeys(regions))
    names = ["system", "tools", "message 1", "message 2", "message 3", "message 4"]
    assert order == ["prompt", *names]
    for name, word in zip(
        names, ("agent", "read", "tests", "run_tests", "failed", "all"), strict=True
    ):
        ids = [i for i, region in zip(prompt.ids, regions, strict=True) if region == name]
        assert word in TOKENIZER.decode(ids)


def test_unchanged_text_is_exactly_what_is_rendered():
    rendered = prompts_of(DEMO, history_bytes=0).make(Conversation(MESSAGES))
    assert TOKENIZER.decode(rendered.ids, skip_special_tokens=False).startswith("<|system|>You are")


@pytest.mark.parametrize("known", [False, True])
def test_what_cannot_fit_is_refused_before_it_is_encoded(known):
    prompts = prompts_of(DEMO)
    messages = [{"role": "user", "content": "one"}]
    if known:
        said(prompts, prompts.make(Conversation(messages)))
        messages.append({"role": "assistant", "content": "two"})
    messages.append({"role": "user", "content": "x" * 100_000})
    with pytest.raises(ContextLengthError):
        prompts.make(Conversation(messages), max_model_len=100)


def test_a_broken_message_is_refused_after_a_known_turn_as_before():
    prompts = prompts_of(DEMO)
    messages = [{"role": "user", "content": "one"}]
    said(prompts, prompts.make(Conversation(messages)))
    messages += [{"role": "assistant", "content": "two"}, {"role": "robot", "content": "three"}]
    with pytest.raises(RequestError, match="unknown role"):
        prompts.make(Conversation(messages))


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({}, True),
        ({"salt": b"other"}, False),
        ({"options": {"enable_thinking": True}}, False),
        ({"tools": TOOLS}, False),
        ({"session": "named"}, True),
    ],
)
def test_what_a_turn_is_known_by(changed, known):
    prompts = prompts_of(DEMO)
    messages = [{"role": "user", "content": "one"}]
    said(prompts, prompts.make(Conversation(messages), b"salt"))
    messages += [{"role": "assistant", "content": "two\n"}, {"role": "user", "content": "three"}]
    conversation = Conversation(messages, changed.get("tools", ()), changed.get("options", {}))
    made = prompts.make(conversation, changed.get("salt", b"salt"), changed.get("session"))
    assert (made.num_known > 0) == known


def test_rules_are_logged_once_a_session(caplog):
    caplog.set_level(logging.INFO, logger="tokenspeed.text")
    prompts = prompts_of(DEMO)
    billing = {"role": "system", "content": "x-anthropic-billing-header: cch=1;\nYou are."}
    for session in ("a", "a", "b"):
        made = prompts.make(Conversation([billing, *MESSAGES[1:]]), session=session)
        assert made.rules == {"drop_attribution": 1}
    told = [record for record in caplog.records if "canonical form" in record.message]
    assert len(told) == 2
    assert "drop_attribution 1" in told[0].message
    assert prompts.rules == {"drop_attribution": 3}


def test_a_template_without_end_costs_nothing_but_itself():
    """Trying it out is given up at its first refusal for cost."""
    calls = []

    def render(messages, **options):
        calls.append(messages)
        raise RequestError("too long", field="messages", code="template_limit")

    prompts = prompts_of(DEMO)
    prompts._tails._render = render
    prompts._tails._local.clear()
    assert not prompts._tails.is_local()
    assert not prompts._tails.is_usable
    assert len(calls) == 1
