# SPDX-License-Identifier: MIT
# ruff: noqa: E501  (lines of templates)
"""Chat templates in the manner of families of models, written for tests, and answers in each.

Markers and the order of things are the families'; the templates are this project's own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from tokenspeed.models.hub import DEMO_FOLDER
from tokenspeed.text.template_sources import folder_sources
from tokenspeed.text.tokenizer import Tokenizer

Calls = Sequence[tuple[str, dict[str, object]]]
Write = Callable[[str, str, Calls], str]

QWEN3 = """
{%- if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and m.reasoning_content %}
{{- '<think>\\n' ~ m.reasoning_content.strip() ~ '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}
{%- for c in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

KIMI = """
{%- if tools %}{{ '<|im_system|>tool_declare<|im_middle|>' ~ (tools | tojson) ~ '<|im_end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_assistant|>assistant<|im_middle|>' }}
{%- if m.reasoning_content %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}{{ m.content }}
{%- if m.tool_calls %}{{ '<|tool_calls_section_begin|>' }}{% for c in m.tool_calls %}
{{- '<|tool_call_begin|>' ~ c.id ~ '<|tool_call_argument_begin|>' ~ (c.function.arguments | tojson) ~ '<|tool_call_end|>' }}
{%- endfor %}{{ '<|tool_calls_section_end|>' }}{% endif %}
{%- elif m.role == 'tool' %}{{ '<|im_system|>tool<|im_middle|>## Return of ' ~ m.tool_call_id ~ '\\n' ~ m.content }}
{%- elif m.role == 'user' %}{{ '<|im_user|>user<|im_middle|>' ~ m.content }}
{%- else %}{{ '<|im_system|>system<|im_middle|>' ~ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""

_DEEPSEEK = """
{%- set ns = namespace(system='', outputs=false, asked=false) %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = ns.system ~ m.content ~ '\\n' %}{% endif %}{% endfor %}
{{- bos_token ~ ns.system }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}
{%- if m.role != 'tool' and ns.outputs %}{{ '<｜tool▁outputs▁end｜>' }}{% set ns.outputs = false %}{% endif %}
{%- if m.role == 'user' %}{% set ns.asked = true %}{{ '<｜User｜>' ~ m.content }}
{%- elif m.role == 'assistant' %}HEAD{% set ns.asked = false %}{{ m.content }}
{%- if m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}{% for c in m.tool_calls %}{% if not loop.first %}{{ '\\n' }}{% endif %}
{{- '<｜tool▁call▁begin｜>CALL<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}
{{- '<｜end▁of▁sentence｜>' }}
{%- elif m.role == 'tool' %}{% if not ns.outputs %}{{ '<｜tool▁outputs▁begin｜>' }}{% set ns.outputs = true %}{% endif %}
{{- '<｜tool▁output▁begin｜>' ~ m.content ~ '<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}
{%- if ns.outputs %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
{%- if add_generation_prompt and ns.asked %}PROMPT{% endif %}"""
_ARGUMENTS = "' ~ (c.function.arguments | tojson) ~ '"
DEEPSEEK_V3 = (
    _DEEPSEEK.replace("HEAD", "{% if ns.asked %}{{ '<｜Assistant｜>' }}{% endif %}")
    .replace("PROMPT", "{{ '<｜Assistant｜>' }}")
    .replace("CALL", f"function<｜tool▁sep｜>' ~ c.function.name ~ '\\n```json\\n{_ARGUMENTS}\\n```")
)  # fmt: skip
DEEPSEEK_V31 = (
    _DEEPSEEK.replace("HEAD", "{% if ns.asked %}{{ '<｜Assistant｜></think>' }}{% endif %}")
    .replace("PROMPT", "{{ '<｜Assistant｜>' ~ ('<think>' if thinking else '</think>') }}")
    .replace("CALL", f"' ~ c.function.name ~ '<｜tool▁sep｜>{_ARGUMENTS}")
)

GLM = """{{- '[gMASK]<sop>' }}
{%- if tools %}{{ '<|system|>\\n' ~ (tools | tojson) }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\\n' ~ m.content }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>\\n<think>' }}
{%- if loop.index0 > ns.last and m.reasoning_content %}{{ m.reasoning_content.strip() }}{% endif %}{{ '</think>' }}
{%- if m.content.strip() %}{{ '\\n' ~ m.content.strip() }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ '\\n<tool_call>' ~ c.function.name ~ '\\n' }}
{%- for k, v in c.function.arguments.items() %}{{ '<arg_key>' ~ k ~ '</arg_key>\\n<arg_value>' ~ (v if v is string else v | tojson) ~ '</arg_value>\\n' }}{% endfor %}
{{- '</tool_call>' }}{% endfor %}
{%- elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif %}
{{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{%- else %}{{ '<|system|>\\n' ~ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>\\n' }}{% endif %}{% endif %}"""

MINIMAX = """
{%- if messages[0].role == 'system' or tools %}{{ ']~b]system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}{{ '\\n<tool>' ~ (tool.function | tojson) ~ '</tool>' }}{% endfor %}{{ '[e~[\\n' }}{% endif %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in turns %}
{%- if m.role == 'system' %}{{ raise_exception('a system message must come first') }}
{%- elif m.role == 'user' %}{{ ']~b]user\\n' ~ m.content ~ '[e~[\\n' }}
{%- elif m.role == 'assistant' %}{{ ']~b]ai\\n' }}
{%- if m.reasoning_content and loop.last %}{{ '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}
{%- if m.tool_calls %}{{ '\\n<minimax:tool_call>' }}{% for c in m.tool_calls %}{{ '\\n<invoke name="' ~ c.function.name ~ '">' }}
{%- for k, v in c.function.arguments.items() %}{{ '\\n<parameter name="' ~ k ~ '">' ~ (v if v is string else v | tojson) ~ '</parameter>' }}{% endfor %}
{{- '\\n</invoke>' }}{% endfor %}{{ '\\n</minimax:tool_call>' }}{% endif %}{{ '[e~[\\n' }}
{%- elif m.role == 'tool' %}{% if turns[loop.index0 - 1].role != 'tool' %}{{ ']~b]tool' }}{% endif %}
{{- '\\n<response>' ~ m.content ~ '</response>' }}
{%- if loop.last or turns[loop.index0 + 1].role != 'tool' %}{{ '[e~[\\n' }}{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ ']~b]ai\\n<think>\\n' }}{% endif %}"""

LLAMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' ~ system ~ '<|eot_id|>' }}
{%- for m in turns %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set f = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' ~ f.name ~ '", "parameters": ' ~ (f.arguments | tojson) ~ '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ (m.content | tojson) ~ '<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' }}
{%- if loop.first and tools %}{% for tool in tools %}{{ (tool | tojson) ~ '\\n' }}{% endfor %}{% endif %}
{{- m.content | trim ~ '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

HARMONY = """
{%- set ns = namespace(tool='') %}
{{- '<|start|>system<|message|>Reasoning: ' ~ (reasoning_effort or 'medium') ~ '<|end|>' }}
{%- if messages[0].role in ('system', 'developer') or tools %}{{ '<|start|>developer<|message|>' }}
{%- if messages[0].role in ('system', 'developer') %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}{{ '<|end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|start|>user<|message|>' ~ m.content ~ '<|end|>' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- if m.reasoning_content %}{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.reasoning_content ~ '<|end|>' }}{% endif %}
{%- set f = m.tool_calls[0].function %}{% set ns.tool = f.name %}
{{- '<|start|>assistant<|channel|>commentary to=functions.' ~ f.name ~ ' <|constrain|>json<|message|>' ~ (f.arguments | tojson) ~ '<|call|>' }}
{%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- elif m.role == 'tool' %}{{ '<|start|>functions.' ~ ns.tool ~ ' to=assistant<|channel|>commentary<|message|>' ~ (m.content | tojson) ~ '<|end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """`write` gives an answer of (thought, content, calls), with the token that ends it."""

    name: str
    template: str
    tokens: str  # added to the demo's vocabulary
    ends: str
    write: Write
    parallel: bool = True  # several calls in an answer
    mixed: bool = True  # content before calls
    thinks: bool = True
    keeps_inline: bool = True  # system messages in the middle
    # Whether the template writes turns without thoughts as the model does.
    stable: bool = True

    def tokenizer(self) -> Tokenizer:
        """The demo's, with the family's tokens."""
        inner = FastTokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
        markers = self.tokens.split() + self.ends.split()
        inner.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
        ids = tuple(sorted(inner.token_to_id(end) for end in self.ends.split()))
        bos = {"bos_token": "<|begin_of_text|>" if "begin_of_text" in self.tokens else ""}
        return Tokenizer(inner, special_tokens=bos, eos_ids=ids)


def _json(arguments: dict[str, object]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _think(thought: str, after: str = "\n\n") -> str:
    return f"<think>\n{thought}\n</think>{after}" if thought else ""


def _qwen3(thought: str, content: str, calls: Calls) -> str:
    parts = [content] if content else []
    parts += [
        f'<tool_call>\n{{"name": "{name}", "arguments": {_json(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    ]
    return _think(thought) + "\n".join(parts) + "<|im_end|>"


def _kimi(thought: str, content: str, calls: Calls) -> str:
    made = "".join(
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{_json(arguments)}"
        "<|tool_call_end|>"
        for i, (name, arguments) in enumerate(calls)
    )
    if made:
        made = f"<|tool_calls_section_begin|>{made}<|tool_calls_section_end|>"
    return _think(thought, "") + content + made + "<|im_end|>"


def _deepseek(head: str, before: str, after: str) -> Write:
    def write(thought: str, content: str, calls: Calls) -> str:
        made = "\n".join(
            f"<｜tool▁call▁begin｜>{head.format(name)}{before}{_json(arguments)}{after}"
            "<｜tool▁call▁end｜>"
            for name, arguments in calls
        )
        if made:
            made = f"<｜tool▁calls▁begin｜>{made}<｜tool▁calls▁end｜>"
        return _think(thought) + content + made + "<｜end▁of▁sentence｜>"

    return write


def _glm(thought: str, content: str, calls: Calls) -> str:
    made = f"<think>{thought}</think>" + (f"\n{content}" if content else "")
    for name, arguments in calls:
        values = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>"
            f"{value if isinstance(value, str) else json.dumps(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        made += f"\n<tool_call>{name}\n{values}</tool_call>"
    return made + ("<|observation|>" if calls else "<|user|>")


def _minimax(thought: str, content: str, calls: Calls) -> str:
    made = ""
    for name, arguments in calls:
        values = "".join(
            f'\n<parameter name="{key}">{value if isinstance(value, str) else json.dumps(value)}'
            "</parameter>"
            for key, value in arguments.items()
        )
        made += f'\n<invoke name="{name}">{values}\n</invoke>'
    if made:
        made = f"\n<minimax:tool_call>{made}\n</minimax:tool_call>"
    return f"{thought or 'Hm.'}\n</think>\n\n{content}{made}[e~["


def _llama(thought: str, content: str, calls: Calls) -> str:
    if calls:
        name, arguments = calls[0]
        return f'{{"name": "{name}", "parameters": {_json(arguments)}}}<|eot_id|>'
    return content + "<|eot_id|>"


def _harmony(thought: str, content: str, calls: Calls) -> str:
    made = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if not calls:
        return f"{made}<|channel|>final<|message|>{content}<|return|>"
    name, arguments = calls[0]
    head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return f"{made}{head}{_json(arguments)}<|call|>"


def _demo(thought: str, content: str, calls: Calls) -> str:
    made = "".join(
        f'<tool_call>{{"name": "{name}", "arguments": {_json(arguments)}}}</tool_call>'
        for name, arguments in calls
    )
    return (f"<think>{thought}</think>" if thought else "") + content + made + "<|end|>"


_DEEPSEEK_TOKENS = """<｜User｜> <｜Assistant｜> <think> </think> <｜tool▁calls▁begin｜>
<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜>
<｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>"""
_KIMI_TOKENS = """<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <think> </think>
<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|>
<|tool_call_argument_begin|> <|tool_call_end|>"""

FAMILIES = {
    family.name: family
    for family in (
        Family("demo", folder_sources(DEMO_FOLDER)["default"], "", "<|end|>", _demo),
        Family(
            "qwen3",
            QWEN3,
            "<|im_start|> <think> </think> <tool_call> </tool_call>",
            "<|im_end|> <|endoftext|>",
            _qwen3,
        ),
        Family("kimi_k2", KIMI, _KIMI_TOKENS, "<|im_end|>", _kimi),
        Family(
            "deepseek_v3",
            DEEPSEEK_V3,
            _DEEPSEEK_TOKENS,
            "<｜end▁of▁sentence｜>",
            _deepseek("function<｜tool▁sep｜>{}", "\n```json\n", "\n```"),
            keeps_inline=False,
        ),
        Family(
            "deepseek_v31",
            DEEPSEEK_V31,
            _DEEPSEEK_TOKENS,
            "<｜end▁of▁sentence｜>",
            _deepseek("{}<｜tool▁sep｜>", "", ""),
            keeps_inline=False,
        ),
        Family(
            "glm45",
            GLM,
            "[gMASK] <sop> <|system|> <|assistant|> <think> </think> <tool_call> </tool_call>",
            "<|user|> <|observation|> <|endoftext|>",
            _glm,
        ),
        Family(
            "minimax_m2",
            MINIMAX,
            "]~b] <think> </think> <minimax:tool_call> </minimax:tool_call>",
            "[e~[",
            _minimax,
            keeps_inline=False,
            stable=False,
        ),
        Family(
            "llama3_json",
            LLAMA,
            "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|python_tag|>",
            "<|eot_id|> <|eom_id|>",
            _llama,
            parallel=False,
            mixed=False,
            thinks=False,
        ),
        Family(
            "harmony",
            HARMONY,
            "<|start|> <|message|> <|channel|> <|constrain|> <|end|>",
            "<|return|> <|call|>",
            _harmony,
            parallel=False,
            mixed=False,
            keeps_inline=False,
        ),
    )
}
