# SPDX-License-Identifier: MIT
"""Chat templates: the same text as transformers, bounded, and rendered in a killable process."""

import json
import os
import time
from datetime import datetime

import pytest

from tokenspeed.errors import ModelLoadError, RequestError
from tokenspeed.text import template_worker
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.template_worker import TemplateWorker

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"ü": ["<&>", 1.5]}}}]
TEMPLATE = """{{- bos_token }}
{%- if tools %}
    {{- tools | tojson }} {{ tools[0] | tojson(indent=2) }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {%- if message.role == 'assistant' %}
{% generation %}<a>{{ message.content }}{% for c in message.tool_calls or [] %}
{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}</a>{% endgeneration %}
    {%- else %}
<{{ message['role'] }}>{{ message['content'] | trim }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}<a>{% if thinking is defined %}{{ thinking }}{% endif %}{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": "  be brief "},
    {"role": "user", "content": "hé <b> & 'x'"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
        ],
    },
    {"role": "tool", "content": "42"},
]


def made(text: str = TEMPLATE) -> ChatTemplate:
    return ChatTemplate({"default": text}, {"bos_token": "<s>"})


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("generate", [True, False])
def test_same_text_as_transformers(tools, generate):
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template(
        conversations=[MESSAGES],
        tools=tools,
        chat_template=TEMPLATE,
        add_generation_prompt=generate,
        bos_token="<s>",
        thinking="on",
    )
    ours = made().render(MESSAGES, tools=tools, add_generation_prompt=generate, thinking="on")
    assert ours == theirs[0]


def test_strftime_now_and_raise_exception():
    today = made("{{ strftime_now('%Y-%m') }}").render([])
    assert today == datetime.now().strftime("%Y-%m")
    with pytest.raises(RequestError, match="only users"):
        made("{{ raise_exception('only users') }}").render([])


def test_parts_become_one_string_and_arguments_become_objects():
    text = made("{{ messages | tojson }}").render(
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "hm",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "assistant", "content": None},
        ]
    )
    user, call, empty = json.loads(text)
    assert user["content"] == "a\nb"
    assert call["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert call["content"] is None
    assert call["reasoning_content"] == call["reasoning"] == "hm"
    assert empty["content"] == ""


def test_template_that_joins_arguments_as_text():
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    text = made("{{ '' + messages[0].tool_calls[0].function.arguments }}").render(
        [{"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    assert text == '{"x": 1}'


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_malformed_messages_name_the_field(message, field):
    with pytest.raises(RequestError) as caught:
        made().render([message])
    assert caught.value.field == field


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ undefined.attribute }}",
        "{{ 1 + 'a' }}",
        "{% include 'x' %}",
    ],
)
def test_sandbox_turns_trouble_into_a_request_error(text):
    with pytest.raises(RequestError):
        made(text).render([{"role": "user", "content": "x"}])


def test_endless_output_is_cut_off():
    loop = "{% for a in range(99999) %}{% for a in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="longer than"):
        made(loop).render([])


def test_sources_of_a_folder(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    pair = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": pair}))
    template = ChatTemplate.from_folder(tmp_path, {})
    assert template.render([]) == "plain"
    assert template.render([], tools=TOOLS) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_folder(tmp_path, {}).render([]) == "file"
    given = tmp_path / "given.jinja"
    given.write_text("given")
    assert ChatTemplate.from_folder(tmp_path, {}, str(given)).render([]) == "given"
    assert ChatTemplate.from_folder(tmp_path, {}, "{{ 'text' }}").render([]) == "text"
    config.write_text(json.dumps({"chat_template": [{"name": "x"}]}))
    with pytest.raises(ModelLoadError):
        ChatTemplate.from_folder(tmp_path, {})


def test_missing_or_broken_templates(tmp_path):
    with pytest.raises(RequestError, match="no chat template"):
        ChatTemplate.from_folder(tmp_path, {}).render([])
    with pytest.raises(ModelLoadError, match="malformed"):
        made("{% for %}")
    with pytest.raises(ModelLoadError, match="cannot read"):
        ChatTemplate.from_folder(tmp_path, {}, "missing.jinja")


def test_worker_renders_like_the_template_itself():
    worker = TemplateWorker(made())
    try:
        assert worker.render(MESSAGES, tools=TOOLS) == made().render(MESSAGES, tools=TOOLS)
        with pytest.raises(RequestError) as caught:
            worker.render([{"role": "robot"}])
        assert caught.value.field == "messages[0].role"
        assert worker.num_kills == 0
    finally:
        worker.close()


ENDLESS = (
    "{% if spin %}{% for a in range(99999) %}{% for a in range(99999) %}{% endfor %}{% endfor %}"
)
ENDLESS += "{% endif %}{% if big %}{{ messages[0].content * 9999999999 }}{% endif %}ok"


def test_worker_survives_templates_without_end(monkeypatch):
    worker = TemplateWorker(made(ENDLESS), wall_limit_s=0.5)
    try:
        begin = time.monotonic()
        with pytest.raises(RequestError) as caught:
            worker.render([], spin=True)
        assert caught.value.code == "template_limit"
        assert time.monotonic() - begin < 3.0
        assert worker.num_kills == 1
        with pytest.raises(RequestError):
            worker.render([{"role": "user", "content": "x"}], big=True)
        assert worker.render([]) == "ok"
    finally:
        worker.close()


def test_worker_child_ends_itself_after_its_cpu_limit():
    worker = TemplateWorker(made(ENDLESS), wall_limit_s=30.0)
    try:
        with pytest.raises(RequestError):
            worker.render([], spin=True)
    finally:
        worker.close()
    assert template_worker.CPU_LIMIT_S < template_worker.WALL_LIMIT_S < 30.0


def test_worker_is_started_again_after_it_died():
    worker = TemplateWorker(made("ok"))
    try:
        assert worker.render([]) == "ok"
        assert worker._child is not None
        os.kill(worker._child.pid, 9)
        worker._child.wait()
        assert worker.render([]) == "ok"
    finally:
        worker.close()


def test_a_closed_worker_starts_no_child():
    worker = TemplateWorker(made("ok"))
    worker.start()
    worker.close()
    with pytest.raises(RequestError, match="closing"):
        worker.render([])
    assert worker._child is None
