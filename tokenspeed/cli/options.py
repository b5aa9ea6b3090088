# SPDX-License-Identifier: MIT
"""Config dataclasses -> command-line flags and back. Knows argparse, not what an option does."""

import argparse
import dataclasses
import difflib
import types
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from tokenspeed.config import EngineConfig


class Parser(argparse.ArgumentParser):
    """Refuses abbreviations and names the nearest right flag for a wrong one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        words = message.rpartition("unrecognized arguments: ")[2].split()
        flags = list(self._option_string_actions)
        for word in words if "unrecognized" in message else ():
            near = difflib.get_close_matches(word.partition("=")[0], flags, n=1, cutoff=0.5)
            if near:
                message += f"\n  {word.partition('=')[0]}: did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def flag_of(name: str) -> str:
    """The flag of an option name: `max_model_len` -> `--max-model-len`."""
    return "--" + name.replace("_", "-")


def add_options(
    parser: argparse.ArgumentParser, group: type, *, skip: tuple[str, ...] = ()
) -> None:
    """One flag for each field of the dataclass `group`, with its default and help text."""
    box = parser.add_argument_group(group.__name__, (group.__doc__ or "").split("\n")[0])
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        if field.name in skip:
            continue
        flags = [flag_of(field.name), *field.metadata["aliases"]]
        default = "" if field.default in (None, ()) else f" (default: {field.default})"
        box.add_argument(
            *flags,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=(field.metadata["help"] + default).replace("%", "%%"),
            **_kind(hints[field.name]),
        )


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's keywords for a type annotation."""
    if get_origin(hint) is types.UnionType:
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "VALUE"}
    return {"type": hint, "metavar": {int: "N", float: "NUMBER"}.get(hint, "VALUE")}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The optional positional MODEL and a flag for every option of `EngineConfig`."""
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="folder or hub id")
    for group in EngineConfig.groups().values():
        add_options(parser, group, skip=("model",))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flat engine options that were given on the command line."""
    names = {f.name for g in EngineConfig.groups().values() for f in dataclasses.fields(g)}
    return _given(args, names)


def options_of(args: argparse.Namespace, group: type) -> dict[str, Any]:
    """The options of one dataclass that were given on the command line."""
    return _given(args, {f.name for f in dataclasses.fields(group)})


def _given(args: argparse.Namespace, names: set[str]) -> dict[str, Any]:
    found = {name: value for name, value in vars(args).items() if name in names}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
