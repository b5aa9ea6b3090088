# SPDX-License-Identifier: MIT
"""Which format a chat template speaks, and where an answer to what it renders begins.

The templates are sketches in the families' own words, as short as they can be.
"""

import re
from pathlib import Path

import pytest

from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.parsers import FORMATS, choose

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
SAID = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
END = "{% endfor %}{% endfor %}"
NAME, ARGUMENTS = "c.function.name", "c.function.arguments | tojson"
DSML = "{% set dsml = '｜DSML｜' %}" + TOOLS + SAID
INVOKE = f'invoke name="{{{{ {NAME} }}}}">{END}<｜Assistant｜'
TAG = "<{{ dsml }}"
THINKS = "{{ '<think>\n' if thinking else '</think>' }}"


def calls(before: str, between: str, after: str, end: str) -> str:
    """A template that writes calls with these texts around name and arguments."""
    body = f"{before}{{{{ {NAME} }}}}{between}{{{{ {ARGUMENTS} }}}}{after}"
    return TOOLS + SAID + body + END + end


KIMI_CALL = "<|tool_calls_section_begin|><|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
GLM = "<tool_call>{{ c.function.name }}<arg_key>{{ c.k }}</arg_key><arg_value>{{ c.v }}</arg_value>"
QWEN_3_CODER = "<tool_call><function={{ c.function.name }}><parameter={{ c.k }}></parameter>"
MINIMAX = '<minimax:tool_call><invoke name="{{ c.function.name }}">{{ c.function.arguments }}'
GPT_OSS = "<|start|>assistant to=functions.{{ c.name }}<|channel|>commentary json<|message|>"
LLAMA_4 = (
    "{{- '{\"name\": \"' + c.function.name + '\", ' }}{{- '\"parameters\": ' }}<|header_start|>"
)

# Family, its template, and where its answers begin: without more, and with `thinking`.
TEMPLATES = [
    ("kimi_k2", TOOLS + SAID + KIMI_CALL + END + "<|im_middle|>", "content", "content"),
    ("kimi_k2", "<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}", "content", "content"),
    ("deepseek_v32", f"{DSML}{TAG}function_calls>{INVOKE}{THINKS}", "content", "reasoning"),
    ("deepseek_v4", f"{DSML}{TAG}tool_calls>{INVOKE}{THINKS}", "content", "reasoning"),
    ("deepseek_v41", f"{DSML}{TAG} calls>{INVOKE}{THINKS}", "content", "reasoning"),
    ("deepseek_v3", calls("function<｜tool▁sep｜>", "\n```json\n", "\n```", THINKS),
     "content", "reasoning"),
    ("deepseek_v31", calls("", "<｜tool▁sep｜>", "", THINKS), "content", "reasoning"),
    ("harmony", TOOLS + SAID + GPT_OSS + END + "<|start|>assistant", "content", "content"),
    ("minimax_m2", TOOLS + SAID + MINIMAX + END + "]~b]ai\n<think>\n", "reasoning", "reasoning"),
    ("glm45", TOOLS + SAID + GLM + END + "<|assistant|>" + THINKS, "content", "reasoning"),
    ("qwen3_xml", TOOLS + SAID + QWEN_3_CODER + END + THINKS, "content", "reasoning"),
    ("hermes", calls('<tool_call>{"name": "', '", "arguments": ', "}</tool_call>", ""),
     "content", "content"),
    ("pythonic", TOOLS + SAID + "{{ c.function.name + '(' }}" + END, "content", "content"),
    ("llama3_json", TOOLS + SAID + LLAMA_4 + END, "content", "content"),
    ("json", calls("[TOOL_CALLS]", "", "", ""), "content", "content"),
    ("think", "{{ messages[0].content }}<think>\n", "reasoning", "reasoning"),
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(("name", "source", "plain", "thinking"), TEMPLATES)
def test_a_template_and_its_answers(name: str, source: str, plain: str, thinking: str) -> None:
    format_ = choose(source)
    assert format_.name == name
    template = ChatTemplate({"default": source}, {})
    assert format_.starts_in(template.render(MESSAGES)) == plain
    assert format_.starts_in(template.render(MESSAGES, thinking=True)) == thinking


def test_every_format_has_a_template() -> None:
    assert {name for name, *_ in TEMPLATES} == set(FORMATS)


def test_the_documents_list_the_formats_in_order() -> None:
    text = (ROOT / "docs" / "agents.md").read_text()
    table = text.partition("## Formats of answers")[2].partition("\n\n- ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(FORMATS)
