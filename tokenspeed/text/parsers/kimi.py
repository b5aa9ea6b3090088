# SPDX-License-Identifier: MIT
"""`kimi_k2`: Kimi K2 and K2.5. A call is headed by an id of its own, from which its name comes.

    <think>..</think>content<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:INDEX
    <|tool_call_argument_begin|>{..}<|tool_call_end|>..<|tool_calls_section_end|>

without the line breaks. Source: Moonshot AI's tool call guidance for Kimi K2.
"""

import re

from tokenspeed.text.channels import Format
from tokenspeed.text.parsers.marked_json import MarkedJsonParser
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, END_CALL = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)

_ID = re.compile(r"(?:functions\.)?(.*?)(?::[0-9]+)?", re.DOTALL)


class _KimiParser(MarkedJsonParser):
    openers = (SECTION, CALL)
    closers = (END_CALL, END_SECTION)
    ends = (END_CALL, CALL, SECTION, END_SECTION)

    def read_head(self) -> bool:
        text, marker = self.scan.take(ARGUMENTS, *self.ends, keep=True)
        self.raw.append(text)
        if marker is None:
            return False
        call_id = "".join(self.raw).rpartition(CALL)[2].strip()
        if marker == ARGUMENTS:
            self.raw.append(self.scan.expect(marker) or "")
        elif marker != END_CALL:
            return self.give_up()
        name = _ID.fullmatch(call_id)
        return self.begin_arguments(name[1] if name else "", call_id)


def _speaks(source: str) -> bool:
    return SECTION in source or "tool_declare<|im_middle|>" in source


KIMI = Format(
    "kimi_k2",
    (THINK, END_THINK, SECTION, END_SECTION, CALL, ARGUMENTS, END_CALL),
    _KimiParser,
    _speaks,
    think_starts_in,
)
