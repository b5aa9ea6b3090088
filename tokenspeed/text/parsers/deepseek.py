# SPDX-License-Identifier: MIT
"""`deepseek_v3` and `deepseek_v31`: DeepSeek V3, R1 and V3.1. One parser reads both.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {..}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

and in V3.1 `NAME<｜tool▁sep｜>{..}` without a fence. Source: the models' chat templates.
"""

from tokenspeed.text.channels import Format
from tokenspeed.text.parsers.marked_json import MarkedJsonParser
from tokenspeed.text.parsers.thinking import END_THINK, THINK, think_starts_in

SECTION, END_SECTION = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"


class _DeepseekParser(MarkedJsonParser):
    openers = (SECTION, CALL)
    closers = (END_CALL, END_SECTION)
    ends = (END_CALL, CALL, SECTION, END_SECTION)
    fences = (FENCE,)

    def read_head(self) -> bool:
        text, marker = self.scan.take(SEPARATOR, *self.ends, keep=True)
        self.raw.append(text)
        if marker is None:
            return False
        if marker != SEPARATOR:
            return self.give_up()
        self.raw.append(self.scan.expect(marker) or "")
        self.state = self._read_name
        return True

    def _read_name(self) -> bool:
        """In V3 the name and a fence stand before the object, in V3.1 nothing does."""
        text, marker = self.scan.take(*self.ends, keep=True)
        before, brace, after = text.partition("{")
        self.raw.append(before)
        if not brace and marker is None:
            return False
        head, _, between = "".join(self.raw).rpartition(SEPARATOR)
        lines = between.partition(FENCE)[0].split()
        name = lines[0] if lines else head.rpartition(CALL)[2].strip()
        return self.begin_arguments(name, None, brace + after)


def _speaks_v3(source: str) -> bool:
    return SEPARATOR in source and f"{FENCE}json" in source


def _speaks_v31(source: str) -> bool:
    return SEPARATOR in source


_MARKERS = (THINK, END_THINK, SECTION, END_SECTION, CALL, SEPARATOR, END_CALL)

DEEPSEEK_V3 = Format("deepseek_v3", _MARKERS, _DeepseekParser, _speaks_v3, think_starts_in)
DEEPSEEK_V31 = Format("deepseek_v31", _MARKERS, _DeepseekParser, _speaks_v31, think_starts_in)
