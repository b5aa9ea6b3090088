# SPDX-License-Identifier: MIT
"""How each format of answers writes calls, for grammars. The inverse of `text/parsers/`.

    trigger [rest of opening] [prefix NAME suffix ARGUMENTS tail] [between prefix NAME ...] closing

A `#` in `suffix` stands for a number. Knows texts alone: which of them are tokens, the caller does.
"""

from dataclasses import dataclass
from typing import Final

_DSML: Final = "｜DSML｜"


@dataclass(frozen=True)
class CallSyntax:
    """`style`: how xgrammar calls the way in which arguments are written.

    `parameter` stands around the one parameter of a custom tool, where arguments are not JSON;
    `inner` are the markers in arguments that a vocabulary may have as tokens.
    """

    trigger: str  # what a call begins with, and nothing else
    prefix: str
    suffix: str
    tail: str
    opening: str = ""  # after the trigger, before the first prefix
    closing: str = ""
    between: str | None = None  # None: one call an answer
    style: str = "json"
    parameter: tuple[str, str] = ("", "")
    inner: tuple[str, ...] = ()


def _dsml(section: str, style: str, space: str = "") -> CallSyntax:
    mark = _DSML + space
    return CallSyntax(
        trigger=f"<{mark}{section}>",
        prefix=f'\n<{mark}invoke name="',
        suffix='">\n',
        tail=f"\n</{mark}invoke>",
        closing=f"\n</{mark}{section}>",
        between="",
        style=style,
        parameter=(
            f'<{mark}parameter name="input" string="true">',
            f"</{mark}parameter>",
        ),
        inner=(_DSML,),
    )


_DEEPSEEK: Final = CallSyntax(
    trigger="<｜tool▁calls▁begin｜>",
    prefix="<｜tool▁call▁begin｜>",
    suffix="<｜tool▁sep｜>",
    tail="<｜tool▁call▁end｜>",
    closing="<｜tool▁calls▁end｜>",
    between="",
)

SYNTAXES: Final[dict[str, CallSyntax]] = {
    "kimi_k2": CallSyntax(
        trigger="<|tool_calls_section_begin|>",
        prefix="<|tool_call_begin|>functions.",
        suffix=":#<|tool_call_argument_begin|>",
        tail="<|tool_call_end|>",
        closing="<|tool_calls_section_end|>",
        between="",
    ),
    "deepseek_v3": CallSyntax(
        trigger="<｜tool▁calls▁begin｜>",
        prefix="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        suffix="\n```json\n",
        tail="\n```<｜tool▁call▁end｜>",
        closing="<｜tool▁calls▁end｜>",
        between="\n",
    ),
    "deepseek_v31": _DEEPSEEK,
    "deepseek_v32": _dsml("function_calls", "deepseek_xml"),
    "deepseek_v4": _dsml("tool_calls", "deepseek_xml"),
    "deepseek_v41": _dsml("calls", "deepseek_v4_1_xml", " "),
    "harmony": CallSyntax(
        trigger="<|channel|>",
        opening="commentary to=functions.",
        prefix="",
        suffix=" <|constrain|>json<|message|>",
        tail="",  # the call's own end ends the answer
    ),
    "minimax_m2": CallSyntax(
        trigger="<minimax:tool_call>",
        prefix='\n<invoke name="',
        suffix='">\n',
        tail="\n</invoke>",
        closing="\n</minimax:tool_call>",
        between="",
        style="minimax_xml",
        parameter=('<parameter name="input">', "</parameter>"),
        inner=("<invoke", "</invoke>", "<parameter", "</parameter>"),
    ),
    "glm45": CallSyntax(
        trigger="<tool_call>",
        prefix="",
        suffix="\n",
        tail="\n</tool_call>",
        between="\n<tool_call>",
        style="glm_xml",
        parameter=("<arg_key>input</arg_key>\n<arg_value>", "</arg_value>"),
        inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "qwen3_xml": CallSyntax(
        trigger="<tool_call>",
        prefix="\n<function=",
        suffix=">\n",
        tail="\n</function>\n</tool_call>",
        between="\n<tool_call>",
        style="qwen_xml",
        parameter=("<parameter=input>\n", "\n</parameter>"),
        inner=("<function=", "</function>", "<parameter=", "</parameter>"),
    ),
    "hermes": CallSyntax(
        trigger="<tool_call>",
        prefix='\n{"name": "',
        suffix='", "arguments": ',
        tail="}\n</tool_call>",
        between="\n<tool_call>",
    ),
    "llama3_json": CallSyntax(
        trigger='{"name": "', prefix="", suffix='", "parameters": ', tail="}"
    ),
    "json": CallSyntax(trigger='{"name": "', prefix="", suffix='", "arguments": ', tail="}"),
}
