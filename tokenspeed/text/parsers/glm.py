# SPDX-License-Identifier: MIT
"""`glm45`: calls as GLM 4.5 and those after it write them.

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

The line break after the name may be missing, as in `<tool_call>NAME</tool_call>`.
"""

from tokenspeed.text.channels import Format
from tokenspeed.text.parsers.tags import TagParser, Tags
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

_TAGS = Tags(
    section=("", ""),
    call=("<tool_call>", "</tool_call>"),
    name_end="\n",
    parameter="<arg_key>",
    key_end="</arg_key>",
    value="<arg_value>",
    value_end="</arg_value>",
)
_KEY = (_TAGS.parameter, _TAGS.key_end)
_MARKERS = (THINK, END_THINK, *_TAGS.call, *_KEY, _TAGS.value, _TAGS.value_end)


class GlmParser(TagParser):
    tags = _TAGS
    openers = _TAGS.call[:1]


def _speaks(source: str) -> bool:
    return "<arg_key>" in source and "<arg_value>" in source


GLM45 = Format("glm45", _MARKERS, GlmParser, _speaks, think_starts_in)
