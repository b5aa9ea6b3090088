# SPDX-License-Identifier: MIT
"""Writes docs/parameters.md: `python -m tokenspeed.cli.parameters`. Knows options, no meaning."""

import dataclasses
from collections.abc import Iterator
from typing import get_type_hints

from tokenspeed.cli.options import flag_of
from tokenspeed.config import EngineConfig, ServerOptions


def lines() -> Iterator[str]:
    """The page's lines, one table for each group of options."""
    yield "# Parameters"
    yield ""
    yield "Made by `python -m tokenspeed.cli.parameters`. The name in Python is the flag's, with"
    yield "underscores: `LLM(max_model_len=4096)`."
    for group in [*EngineConfig.groups().values(), ServerOptions]:
        hints = get_type_hints(group)
        yield from ("", f"## {group.__name__}", "", group.__doc__.strip(), "")
        yield from ("| flag | type | default | meaning |", "|---|---|---|---|")
        for field in dataclasses.fields(group):
            flags = ", ".join(f"`{f}`" for f in (flag_of(field.name), *field.metadata["aliases"]))
            flags = "`MODEL` (first argument)" if field.name == "model" else flags
            kind = str(hints[field.name]).removeprefix("<class '").removesuffix("'>")
            kind = kind.replace("typing.", "").replace("|", "or")
            default = "" if field.default is None else f"`{field.default}`"
            yield f"| {flags} | {kind} | {default} | {field.metadata['help']} |"


if __name__ == "__main__":
    print("\n".join(lines()))
