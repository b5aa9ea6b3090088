# SPDX-License-Identifier: MIT
"""Going on from a turn gives the ids of rendering all of it, for every family's template."""

import json
import random

import pytest

from tests.unit.chat_families import FAMILIES, Family
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.conversation import Conversation, Tool
from tokenspeed.text.history_keys import Spoken
from tokenspeed.text.parsers import choose
from tokenspeed.text.prompt import Prompts

TOOLS = tuple(
    Tool(name, "Does it.", {"type": "object", "properties": {"path": {"type": "string"}}})
    for name in ("read_file", "run_tests")
)
WORDS = ("so", "it is", "\n", "\n\n", " ", "é", "日本", "🙂", "x = 1", "  ", "a<b", "don't", "1234")
STABLE = [name for name, family in FAMILIES.items() if family.stable]


def prompts_of(family: Family, history_bytes: int = 1 << 20) -> Prompts:
    tokenizer = family.tokenizer()
    template = ChatTemplate({"default": family.template}, tokenizer.special_tokens)
    made = Prompts(tokenizer, template.render, choose(family.template), history_bytes=history_bytes)
    made.prepare()
    return made


def some_text(rng: random.Random) -> str:
    return "x" + "".join(rng.choice(WORDS) for _ in range(rng.randint(0, 9))).strip() + "."


def some_answer(rng: random.Random, family: Family, number: int) -> dict:
    """An assistant's message without thoughts."""
    if rng.random() < 0.4:
        return {"role": "assistant", "content": some_text(rng)}
    count = rng.randint(1, 2) if family.parallel else 1
    calls = [
        {
            "id": f"functions.{tool.name}:{i}",
            "type": "function",
            "function": {
                "name": tool.name,
                "arguments": json.dumps({"path": some_text(rng), "n": number}),
            },
        }
        for i, tool in enumerate(TOOLS[:count])
    ]
    content = some_text(rng) if family.mixed and rng.random() < 0.5 else ""
    return {"role": "assistant", "content": content, "tool_calls": calls}


def what_follows(rng: random.Random, answer: dict, family: Family) -> list[dict]:
    made = [
        {"role": "tool", "tool_call_id": call["id"], "content": some_text(rng)}
        for call in answer.get("tool_calls", ())
    ]
    if not made or rng.random() < 0.2:
        made.append({"role": "user", "content": some_text(rng)})
    if family.keeps_inline and rng.random() < 0.3:
        made.append({"role": "system", "content": some_text(rng)})
    return made


def spoken_of(message: dict) -> Spoken:
    calls = tuple(
        (call["function"]["name"], call["id"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    )
    return Spoken((message["content"],), calls)


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize("seed", range(12))
def test_same_ids_as_rendering_everything(name, seed):
    """The answer's ids are what the whole rendering has in its place, so that nothing differs."""
    family, rng = FAMILIES[name], random.Random(seed)
    fast, slow = prompts_of(family), prompts_of(family, history_bytes=0)
    # Families that write an empty thought into history are asked not to think.
    options = {"enable_thinking": False} if name == "glm45" else {}
    messages = [{"role": "user", "content": some_text(rng)}]
    if rng.random() < 0.7:
        messages.insert(0, {"role": "system", "content": some_text(rng)})
    tools = TOOLS if rng.random() < 0.8 else ()
    for turn in range(5):
        prompt = fast.make(Conversation(messages, tools, options))
        assert (prompt.num_known > 0) == (turn > 0)
        answer = some_answer(rng, family, turn)
        messages = [*messages, answer, *what_follows(rng, answer, family)]
        whole = slow.make(Conversation(messages, tools, options)).ids
        assert whole[: len(prompt.ids)] == prompt.ids
        output, stop = sampled(family, whole, len(prompt.ids))
        fast.record(prompt, spoken_of(answer), output, stop)
        assert fast.make(Conversation(messages, tools, options)).ids == whole


def sampled(family: Family, whole: list[int], start: int) -> tuple[list[int], int]:
    """What the model said, from where its prompt ended to the token that ends it."""
    tokenizer = family.tokenizer()
    ends = set(tokenizer.eos_ids)
    if family.name == "harmony":
        ends.add(tokenizer.inner.token_to_id("<|end|>"))
    end = next(i for i in range(start, len(whole)) if whole[i] in ends)
    stop = whole[end]
    if stop not in tokenizer.eos_ids:
        stop = tokenizer.inner.token_to_id("<|return|>")
    return [*whole[start:end], stop], stop


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tools", [False, True])
def test_families_write_what_follows_a_turn_alike_after_anything(name, tools):
    assert prompts_of(FAMILIES[name])._tails.is_local(tools=tools)


def test_a_template_that_counts_is_rendered_as_a_whole():
    """Every turn has its number: what follows one depends on what came before."""
    counts = (
        "{% for m in messages %}<|{{ m.role }}|>{{ loop.index }} {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ messages | length + 1 }} {% endif %}"
    )
    demo = FAMILIES["demo"]
    family = Family("counts", counts, demo.tokens, demo.ends, demo.write)
    prompts = prompts_of(family)
    assert not prompts._tails.is_local()
    messages = [{"role": "user", "content": "one"}]
    prompt = prompts.make(Conversation(messages))
    output = family.tokenizer().encode("two<|end|>", add_special_tokens=False)
    prompts.record(prompt, Spoken(("two",)), output, output[-1])
    messages += [{"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    again = prompts.make(Conversation(messages))
    assert again.num_known == len(prompt.ids) + len(output)
    text = family.tokenizer().decode(again.ids, skip_special_tokens=False)
    assert (
        text == "<|user|>1 one<|end|><|assistant|>2 two<|end|><|user|>3 three<|end|><|assistant|>4 "
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ messages | length }}",
    ],
)
def test_a_template_that_hides_turns_is_rendered_as_ever(template):
    demo = FAMILIES["demo"]
    family = Family("hides", template, demo.tokens, demo.ends, demo.write)
    fast, slow = prompts_of(family), prompts_of(family, history_bytes=0)
    messages = [{"role": "user", "content": "one"}]
    prompt = fast.make(Conversation(messages))
    output = family.tokenizer().encode("two<|end|>", add_special_tokens=False)
    fast.record(prompt, Spoken(("two",)), output, output[-1])
    messages += [{"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    again = fast.make(Conversation(messages))
    assert again.num_known == 0
    assert again.ids == slow.make(Conversation(messages)).ids
