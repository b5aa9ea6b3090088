# SPDX-License-Identifier: MIT
"""`qwen3_xml`: calls in tags, as Qwen 3 Coder, Qwen 3.5 and those after them write them.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

In content a call may lack its `<tool_call>` if there is a tool of its name.
"""

from tokenspeed.text.channels import Format
from tokenspeed.text.parsers.tags import TagParser, Tags
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

_TAGS = Tags(
    section=("<tool_call>", "</tool_call>"),
    call=("<function=", "</function>"),
    name_end=">",
    parameter="<parameter=",
    key_end=">",
    value="",
    value_end="</parameter>",
    padded=True,
)
_MARKERS = (THINK, END_THINK, *_TAGS.section, *_TAGS.call, _TAGS.parameter, _TAGS.value_end)


class QwenXmlParser(TagParser):
    tags = _TAGS
    openers = _TAGS.section[:1]
    closers = _TAGS.section[1:]
    inner = _TAGS.call[:1]

    def _calls(self) -> tuple[str, ...]:
        calls = super()._calls()
        return (*calls, *self.inner) if self.out.channel == "content" else calls


def _speaks(source: str) -> bool:
    return all(tag in source for tag in ("<tool_call>", "<function=", "<parameter="))


QWEN3_XML = Format("qwen3_xml", _MARKERS, QwenXmlParser, _speaks, think_starts_in)
