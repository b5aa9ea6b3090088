# SPDX-License-Identifier: MIT
"""Writes docs/parameters.md: `python -m tokenspeed.cli.parameters`. Knows options, no meaning."""

import dataclasses
import types
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tokenspeed.cli.options import flag_of
from tokenspeed.config import EngineConfig, ServerOptions


def lines() -> Iterator[str]:
    """The page's lines, one table for each group of options."""
    yield "# Parameters"
    yield ""
    yield "Made by `python -m tokenspeed.cli.parameters`. The name in Python is the flag's, with"
    yield "underscores: `LLM(max_model_len=4096)`. What is on or off is set by `--flag` or"
    yield "`--no-flag`, in Python by `True` or `False`."
    for group in [*EngineConfig.groups().values(), ServerOptions]:
        hints = get_type_hints(group)
        yield from ("", f"## {group.__name__}", "", group.__doc__.strip(), "")
        yield from ("| flag | type | default | meaning |", "|---|---|---|---|")
        for field in dataclasses.fields(group):
            flags = ", ".join(f"`{f}`" for f in (flag_of(field.name), *field.metadata["aliases"]))
            flags = "`MODEL` (first argument)" if field.name == "model" else flags
            kind = _kind(hints[field.name])
            default = _default(field.default)
            yield f"| {flags} | {kind} | {default} | {field.metadata['help']} |"


def _kind(hint: Any) -> str:
    """A type annotation in plain words."""
    if get_origin(hint) is types.UnionType:
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return "one or more texts"
    return {bool: "on or off", int: "integer", float: "number", str: "text"}[hint]


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value in (None, ()) else f"`{value}`"


if __name__ == "__main__":
    print("\n".join(lines()))
