# SPDX-License-Identifier: MIT
"""`minimax_m2`: calls as MiniMax M2 and those after it write them.

<minimax:tool_call>
<invoke name="NAME">
<parameter name="KEY">VALUE</parameter>
</invoke>
</minimax:tool_call>
"""

from tokenspeed.text.channels import Format
from tokenspeed.text.parsers.tags import TagParser, Tags
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

_TAGS = Tags(
    section=("<minimax:tool_call>", "</minimax:tool_call>"),
    call=("<invoke name=", "</invoke>"),
    name_end=">",
    parameter="<parameter name=",
    key_end=">",
    value="",
    value_end="</parameter>",
)
_MARKERS = (THINK, END_THINK, *_TAGS.section, *_TAGS.call, _TAGS.parameter, _TAGS.value_end)


class MinimaxParser(TagParser):
    tags = _TAGS
    openers = _TAGS.section[:1]
    closers = _TAGS.section[1:]
    inner = _TAGS.call[:1]


def _speaks(source: str) -> bool:
    return "minimax:tool_call" in source


MINIMAX_M2 = Format("minimax_m2", _MARKERS, MinimaxParser, _speaks, think_starts_in)
