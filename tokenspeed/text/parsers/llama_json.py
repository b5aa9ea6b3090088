# SPDX-License-Identifier: MIT
"""`llama3_json`: Llama 3 and 4 with JSON calls, in the same words as the format `json`.

    <|python_tag|>{"name": .., "parameters": {..}}; {"name": ..

or without the marker where content begins. Behind the marker any name is a call's; other text
there, such as code, is content. Llama 4 writes `<|python_start|>..<|python_end|>`.
Source: the models' prompt formats and chat templates.
"""

from tokenspeed.text.channels import Format
from tokenspeed.text.parsers.json_call import JsonCall
from tokenspeed.text.parsers.plain_json import PlainJsonParser
from tokenspeed.text.parsers.thinking import (
    END_THINK,
    THINK,
    ThinkParser,
    think_starts_in,
)

TAG, PYTHON, END_PYTHON = "<|python_tag|>", "<|python_start|>", "<|python_end|>"
HEADERS = ("<|start_header_id|>", "<|header_start|>")


class _LlamaParser(PlainJsonParser):
    openers = (TAG, PYTHON)
    closers = (END_PYTHON,)

    _tagged = False  # behind a marker, not where content begins

    def read_text(self) -> bool:
        self._tagged = False
        return super().read_text()

    def opened(self, marker: str) -> None:
        super().opened(marker)
        self._tagged = True
        if marker == PYTHON:  # which also stands before plain content
            self.raw, self._unclosed = [], True

    def _calls(self) -> tuple[str, ...]:
        return ThinkParser._calls(self)

    def _new_call(self) -> JsonCall:
        return JsonCall(self.out) if self._tagged else super()._new_call()


def _speaks(source: str) -> bool:
    family = any(header in source for header in HEADERS)
    return family and '{"name": "' in source and '"parameters": ' in source


LLAMA_JSON = Format(
    "llama3_json",
    (THINK, END_THINK, TAG, PYTHON, END_PYTHON),
    _LlamaParser,
    _speaks,
    think_starts_in,
)
