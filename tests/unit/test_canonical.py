# SPDX-License-Identifier: MIT
"""Rules that take out what clients rotate, one by one; what a template does with systems."""

import json

import pytest

from tests.unit.chat_families import FAMILIES
from tokenspeed.text.canonical import RULES, Canonical, chosen_rules
from tokenspeed.text.canonical_probe import Systems, probe_systems
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.conversation import Conversation, Tool

BILLING = "x-anthropic-billing-header: cc_version=2.1.37; cc_entrypoint=cli; cch=3f1a2;"
USER = {"role": "user", "content": "hello"}
KEEPS_NONE = Systems(keeps_inline=False, keeps_second=False, keeps_developer=False)


def applied(messages, rules="all", systems=Systems(), tools=()):  # noqa: B008
    canonical = Canonical(chosen_rules((rules,)), systems)
    made, done, key = canonical.apply(Conversation(messages, tuple(tools)))
    return made, dict(done), key


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (BILLING, None),
        (BILLING + "\n", None),
        (BILLING + "\n\nYou are.\n" + BILLING, "You are.\n" + BILLING),
        ([{"type": "text", "text": BILLING}], None),
        (
            [{"type": "text", "text": BILLING}, {"type": "text", "text": "You are."}],
            [{"type": "text", "text": "You are."}],
        ),
        ([BILLING + "\nA", "B"], ["A", "B"]),
    ],
)
def test_attribution_goes(content, left):
    messages = [{"role": "system", "content": content}, USER]
    made, done, _ = applied(messages)
    expected = [USER] if left is None else [{"role": "system", "content": left}, USER]
    assert made.messages == expected
    assert done == {"drop_attribution": 1}
    assert applied(messages, "none")[0].messages == messages
    assert applied(messages, "sort_tool_keys")[0].messages == messages


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": BILLING}],
        [{"role": "system", "content": "I explain " + BILLING}, USER],
        [{"role": "system", "content": None}, USER],
        [USER, {"role": "system", "content": BILLING}],
        [{"role": "user", "content": [{"type": "text", "text": " "}]}],
        [],
    ],
)
def test_what_was_said_stays(messages):
    made, done, _ = applied(messages)
    assert made.messages is messages
    assert done == {}


def test_tools_are_the_same_in_any_order_of_keys():
    one = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": [2, 1]}}}
    two = {"properties": {"a": {"enum": [2, 1]}, "b": {"type": "string"}}, "type": "object"}
    made = [applied([USER], tools=[Tool("f", "d", schema)]) for schema in (one, two)]
    texts = [json.dumps(conversation.tools[0].parameters) for conversation, _, _ in made]
    assert texts[0] == texts[1] == json.dumps(one, sort_keys=True)
    assert made[0][2] == made[1][2]
    assert made[0][1] == {"sort_tool_keys": 1}
    off = [applied([USER], "none", tools=[Tool("f", "d", schema)]) for schema in (one, two)]
    assert off[0][2] != off[1][2]
    assert list(off[0][0].tools[0].parameters) == ["type", "properties"]
    other = applied([USER], tools=[Tool("f", "d", two | {"type": "array"})])
    assert other[2] != made[0][2]


def test_tools_keep_what_no_model_sees():
    tool = Tool("f", "d", {"b": 1, "a": 2}, namespace="n", own_name="x", strict=True)
    applied([USER], tools=[Tool("f", "d", {"b": 1, "a": 2})])
    canonical = Canonical(chosen_rules(("all",)), Systems())
    canonical.apply(Conversation([USER], (Tool("f", "d", {"b": 1, "a": 2}),)))
    made = canonical.apply(Conversation([USER], (tool,)))[0].tools[0]
    assert (made.namespace, made.own_name, made.strict) == ("n", "x", True)
    assert list(made.parameters) == ["a", "b"]


def test_system_messages_stay_in_place():
    first, second = ({"role": "system", "content": text} for text in ("one", "two"))
    later = {"role": "developer", "content": [{"type": "text", "text": "three"}]}
    tagged = {"role": "system", "content": "<system-reminder>\nfour\n</system-reminder>"}
    messages = [first, second, USER, later, tagged, USER]
    assert applied(messages)[0].messages is messages
    made, done, _ = applied(messages, systems=KEEPS_NONE)
    reminder = "<system-reminder>\nthree\n</system-reminder>"
    assert made.messages == [
        {"role": "system", "content": "one\n\ntwo"},
        USER,
        {"role": "user", "content": reminder},
        {"role": "user", "content": tagged["content"]},
        USER,
    ]
    assert done == {"inline_system": 3}
    renamed = applied(messages, systems=Systems(keeps_developer=False))[0].messages
    assert renamed == [first, second, USER, {**later, "role": "system"}, tagged, USER]


@pytest.mark.parametrize("name", FAMILIES)
def test_probe_finds_what_families_do(name):
    family = FAMILIES[name]
    found = probe_systems(ChatTemplate({"default": family.template}, {"bos_token": "<s>"}).render)
    assert found.keeps_inline == family.keeps_inline


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", Systems()),
        ("nothing", Systems()),
        ("{{ raise_exception('never') }}", Systems()),
        (  # users and assistants must take turns: a reminder would not be rendered either
            "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role"
            " or m.role == 'system' and loop.index0 %}{{ raise_exception('turns') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            Systems(keeps_inline=True, keeps_second=False, keeps_developer=True),
        ),
    ],
)
def test_probe_of_other_templates(template, found):
    assert probe_systems(ChatTemplate({"default": template}, {}).render) == found


def test_rules_are_chosen_by_name():
    assert chosen_rules(()) == chosen_rules(("none",)) == frozenset()
    assert chosen_rules(("all",)) == frozenset(RULES)
    assert chosen_rules(("drop_attribution",)) == {"drop_attribution"}
    with pytest.raises(ValueError, match="unknown rule 'x'; known: all, none, drop_attribution"):
        chosen_rules(("x",))
