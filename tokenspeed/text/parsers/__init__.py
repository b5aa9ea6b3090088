# SPDX-License-Identifier: MIT
"""The formats of answers, and which one a model's chat template speaks. Reads no answers itself.

A format is a file here and a line below. The first that knows a template has it: narrow ones first.
"""

from tokenspeed.text.channels import Format
from tokenspeed.text.parsers.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from tokenspeed.text.parsers.deepseek_dsml import DEEPSEEK_V4, DEEPSEEK_V32, DEEPSEEK_V41
from tokenspeed.text.parsers.glm import GLM45
from tokenspeed.text.parsers.harmony import HARMONY
from tokenspeed.text.parsers.hermes import HERMES
from tokenspeed.text.parsers.kimi import KIMI
from tokenspeed.text.parsers.llama_json import LLAMA_JSON
from tokenspeed.text.parsers.minimax import MINIMAX_M2
from tokenspeed.text.parsers.plain_json import PLAIN_JSON
from tokenspeed.text.parsers.pythonic import PYTHONIC
from tokenspeed.text.parsers.qwen_xml import QWEN3_XML
from tokenspeed.text.parsers.thinking import THINKING

_ALL: tuple[Format, ...] = (
    KIMI,
    DEEPSEEK_V41,
    DEEPSEEK_V32,
    DEEPSEEK_V4,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    HARMONY,
    MINIMAX_M2,
    GLM45,
    QWEN3_XML,
    HERMES,
    PYTHONIC,
    LLAMA_JSON,
    PLAIN_JSON,
    THINKING,  # of no calls: after all others
)

FORMATS: dict[str, Format] = {format_.name: format_ for format_ in _ALL}


def choose(source: str, name: str | None = None) -> Format:
    """The format called `name`, or else the one that a template's Jinja source speaks.

    Raises `ValueError` for a name that there is not.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"no answer format {name!r}: there are {', '.join(FORMATS)}")
    if name is not None:
        return FORMATS[name]
    return next((found for found in FORMATS.values() if found.speaks(source)), THINKING)
