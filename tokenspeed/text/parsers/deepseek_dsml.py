# SPDX-License-Identifier: MIT
"""`deepseek_v32`, `deepseek_v4`, `deepseek_v41`: DeepSeek's DSML. They differ in tags' names.

<｜DSML｜tool_calls>
<｜DSML｜invoke name="NAME">
<｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>

V3.2 has `function_calls` for `tool_calls`, V4.1 ` calls` and a space before the other names. A
value with `string="true"` is text, any other is JSON; one object may stand for all parameters.
Source: the models' encoding documents.
"""

import re

from tokenspeed.text.channels import Format, Inputs
from tokenspeed.text.parsers.json_text import JsonText
from tokenspeed.text.parsers.schema_kinds import KINDS
from tokenspeed.text.parsers.tags import TagParser, Tags
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

DSML = "｜DSML｜"

_STRING = frozenset({"string"})


def _tags(section: str, dsml: str = DSML) -> Tags:
    return Tags(
        section=(f"<{dsml}{section}>", f"</{dsml}{section}>"),
        call=(f"<{dsml}invoke name=", f"</{dsml}invoke>"),
        name_end=">",
        parameter=f"<{dsml}parameter name=",
        key_end=">",
        value="",
        value_end=f"</{dsml}parameter>",
    )


_V32, _V4, _V41 = _tags("function_calls"), _tags("tool_calls"), _tags("calls", DSML + " ")


class _DsmlParser(TagParser):
    """V3.2 and V4: each takes the other's section, too."""

    tags = _V4
    openers: tuple[str, ...] = (_V4.section[0], _V32.section[0])
    closers: tuple[str, ...] = (_V4.section[1], _V32.section[1])
    inner = _V4.call[:1]

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._object = JsonText()

    def opened(self, marker: str) -> None:
        super().opened(marker)
        if marker in self.openers:
            self.state = self._find_call

    def _between(self) -> bool:
        """Instead of parameters, the whole arguments may stand there as an object."""
        self.scan.skip_space()
        if self._count or self.scan.peek() != "{":
            return super()._between()
        self._object = JsonText()
        self.state = self._read_object
        return True

    def _read_object(self) -> bool:
        end, part = self._object.feed(*self.scan.view())
        self.scan.seek(end)
        self.out.arguments(part)
        if self._object.broken:
            return self.close_call(complete=False, unclosed=True)
        if self._object.done:
            self.close_call(unclosed=True)
            self.state = self._read_rest
        return self._object.done

    def _read_rest(self) -> bool:
        """After an object: the call's closing tag."""
        self.out.text(self.scan.skip_space())
        found = self.scan.expect(self.tags.call[1])
        if found == "":
            self.scan.cut(self.tags.call[1])
        if found is not None:
            self.state = self.read_text
        return found is not None

    def parameter(self, header: str) -> tuple[str, frozenset[str]]:
        name, _, flag = header.rpartition(" string=")
        flag = flag.strip().strip('"')
        if not name or flag not in ("true", "false"):
            return super().parameter(header)
        return name.strip().strip('"'), _STRING if flag == "true" else KINDS - _STRING


class _Dsml41Parser(_DsmlParser):
    tags = _V41
    openers = _V41.section[:1]
    closers = _V41.section[1:]
    inner = _V41.call[:1]


def _speaks_v32(source: str) -> bool:
    return DSML in source and "function_calls>" in source


def _speaks_v41(source: str) -> bool:
    return DSML in source and re.search(r"(?:DSML｜|\}\}|['\"]) calls>", source) is not None


def _speaks_v4(source: str) -> bool:
    return DSML in source


def _markers(tags: Tags, *sections: str) -> tuple[str, ...]:
    return (THINK, END_THINK, *sections, *tags.call, tags.parameter, tags.value_end)


_BOTH = _markers(_V4, *_V4.section, *_V32.section)
_ONLY = _markers(_V41, *_V41.section)

DEEPSEEK_V32 = Format("deepseek_v32", _BOTH, _DsmlParser, _speaks_v32, think_starts_in)
DEEPSEEK_V41 = Format("deepseek_v41", _ONLY, _Dsml41Parser, _speaks_v41, think_starts_in)
DEEPSEEK_V4 = Format("deepseek_v4", _BOTH, _DsmlParser, _speaks_v4, think_starts_in)
