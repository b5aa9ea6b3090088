# SPDX-License-Identifier: MIT
"""What every reader asks of its input: what is malformed is refused with its place.

Knows no format.
"""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NoReturn

import numpy as np

Json = dict[str, Any]
LENGTHS_END = 2**31  # no length is that long; the engine counts no further
MOST_BLOCKS = 2**22  # of one prompt: a short line shall not ask for all memory


def refuse(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where a line stands (`file:number`), and the line; of a file that may be gzipped."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def parsed(where: str, text: str) -> Json:
    """A JSON object. NaN and Infinity are none of JSON's numbers."""

    def no_number(name: str) -> NoReturn:
        refuse(where, f"{name} is no number")

    try:
        found = json.loads(text, parse_constant=no_number)
    except (json.JSONDecodeError, RecursionError) as error:
        refuse(where, f"not JSON: {error}")
    if not isinstance(found, dict):
        refuse(where, "not a JSON object")
    return found


def field(where: str, row: Json, name: str) -> Any:
    if name not in row:
        refuse(where, f"{name} is missing")
    return row[name]


def whole(where: str, name: str, value: Any, least: int, end: int | None = LENGTHS_END) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        refuse(where, f"{name} must be a whole number of at least {least}, not {brief(value)}")
    if end is not None and value >= end:
        refuse(where, f"{name} must be below {end}, not {brief(value)}")
    return value


def name(where: str, row: Json) -> str:
    """Its id, which requests carry."""
    found = field(where, row, "id")
    if not isinstance(found, str) or not found:
        refuse(where, f"id must be a string that is not empty, not {brief(found)}")
    return text(where, "id", found)


def text(where: str, name: str, value: str) -> str:
    """JSON may hold halves of characters, which cannot be sent."""
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(where, f"{name} must be text, not {brief(value)}")
    return value


def seconds(where: str, name: str, value: Any) -> float:
    """A time that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        refuse(where, f"{name} must be a time of at least 0, not {brief(value)}")
    return float(value)


def objects(where: str, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        refuse(where, f"{name} must be a list that is not empty")
    return value


def starts(rng: np.random.Generator, number: int, span_s: float) -> list[float]:
    """When `number` sessions start: a Poisson stream, given how many come in `span_s` seconds."""
    if not (math.isfinite(span_s) and span_s >= 0):
        raise ValueError(f"span_s must be at least 0 and finite, not {span_s}")
    return [float(start) for start in np.sort(rng.random(number)) * span_s]


def at_least(name: str, value: float, least: float) -> None:
    """For the arguments of a `make`."""
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be at least {least} and finite, not {value}")
