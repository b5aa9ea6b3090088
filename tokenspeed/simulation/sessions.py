# SPDX-License-Identifier: MIT
"""Sessions of turns as the simulator replays them, and their file. Knows no times of steps.

A prompt is block ids: equal ids are equal text. A turn says how many blocks it keeps of the prompt
before it, and which follow, so that a day of long prompts fits into memory. The file is JSON lines:

    {"workload": "agents", "seed": 0, "scale": 1.0}
    {"session_id": "s1", "user": "u", "parent": null, "start_s": 0.0, "block_size": 64, "turns": [
        [gap_s, kind, input_tokens, output_tokens, cancel_after, keep, [[first, count], ...]], ...]}

`[first, count]` stands for the ids `first, first + 1, ...`, as in the traces of real sessions.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int64]
MOST_BLOCK_ID = 2**30  # ids above stand for what no prompt contains
LENGTHS_END = 2**31  # no length is that long; the engine counts no further
MOST_BLOCKS = 2**22  # of one prompt: a short line shall not ask for all memory
TURN = "gap_s kind input_tokens output_tokens cancel_after keep blocks".split()


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One request. The prompt is `keep` blocks of the one before, `added`, and a tail."""

    gap_s: float  # from the end of the turn before (the session's start) to this one's sending
    kind: str
    input_tokens: int
    output_tokens: int
    cancel_after: int | None  # output tokens after which the client hangs up
    keep: int
    added: Blocks


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that follow one another. `start_s` is from the run's start."""

    session_id: str
    user: str
    parent: str | None
    start_s: float
    block_size: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run replays."""

    name: str
    seed: int
    scale: float
    sessions: tuple[Session, ...]


class BenchTurn(Protocol):
    """A turn that says its whole prompt, as the benchmark's do."""

    @property
    def prompt_blocks(self) -> tuple[int, ...]: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def gap_s(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def cancel_after(self) -> int | None: ...


class BenchSession(Protocol):
    """A session of such turns."""

    @property
    def session_id(self) -> str: ...
    @property
    def turns(self) -> Sequence[BenchTurn]: ...
    @property
    def block_size(self) -> int: ...
    @property
    def start_s(self) -> float: ...
    @property
    def user(self) -> str: ...
    @property
    def parent(self) -> str | None: ...


class BenchWorkload(Protocol):
    """A workload of such sessions."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def sessions(self) -> Sequence[BenchSession]: ...


def condense(workload: BenchWorkload) -> Workload:
    """The same workload by what each turn adds."""
    sessions = (
        Session(s.session_id, s.user, s.parent, s.start_s, s.block_size, _condensed(s.turns))
        for s in workload.sessions
    )
    return Workload(workload.name, workload.seed, workload.scale, tuple(sessions))


def _condensed(turns: Sequence[BenchTurn]) -> tuple[Turn, ...]:
    found: list[Turn] = []
    before = np.empty(0, np.int64)
    for turn in turns:
        blocks = np.array(turn.prompt_blocks, np.int64)
        shorter = min(len(before), len(blocks))
        differs = np.flatnonzero(before[:shorter] != blocks[:shorter])
        keep = int(differs[0]) if len(differs) else shorter
        lengths = (turn.input_tokens, turn.output_tokens, turn.cancel_after)
        found.append(Turn(turn.gap_s, turn.kind, *lengths, keep, blocks[keep:].copy()))
        before = blocks
    return tuple(found)


def write_workload(path: Path, workload: Workload) -> None:
    """The file that `read_workload` reads."""
    with path.open("w", encoding="utf-8") as file:
        names = {"workload": workload.name, "seed": workload.seed, "scale": workload.scale}
        print(json.dumps(names), file=file)
        for session in workload.sessions:
            fields = {name: getattr(session, name) for name in SESSION_FIELDS}
            print(json.dumps(fields | {"turns": [_row(t) for t in session.turns]}), file=file)


SESSION_FIELDS = ("session_id", "user", "parent", "start_s", "block_size")


def _row(turn: Turn) -> list[Any]:
    starts = np.flatnonzero(np.diff(turn.added, prepend=turn.added[:1] - 2) != 1)
    counts = np.diff(starts, append=len(turn.added))
    ranges = [[int(turn.added[s]), int(n)] for s, n in zip(starts, counts, strict=True)]
    lengths = (turn.input_tokens, turn.output_tokens, turn.cancel_after, turn.keep)
    return [turn.gap_s, turn.kind, *lengths, ranges]


def read_workload(path: Path) -> Workload:
    """`ValueError` names the line that is no part of such a file, and what is wrong with it."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = enumerate(file, 1)
            names = _checked(path, lines, _names)
            if not names:
                raise ValueError(f"{path}: the file is empty")
            name, seed, scale = names[0]
            return Workload(name, seed, scale, tuple(_checked(path, lines, _session)))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _checked(path: Path, lines: Iterator[tuple[int, str]], parse: Any) -> list[Any]:
    """Of all lines, or, for the names, of the first."""
    found = []
    for number, line in lines:
        try:
            found.append(parse(_object(line)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}:{number}: {what}") from error
        except RecursionError as error:
            raise ValueError(f"{path}:{number}: nested too deeply") from error
        if parse is _names:
            break
    return found


def _object(line: str) -> dict[str, Any]:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")
    return found


def _names(given: dict[str, Any]) -> tuple[str, int, float]:
    return str(given["workload"]), int(given["seed"]), _time("scale", given["scale"])


def _session(given: dict[str, Any]) -> Session:
    if not (isinstance(given["turns"], list) and given["turns"]):
        raise ValueError("turns: must be a list of at least one")
    size = _count("block_size", given["block_size"], 1)
    turns: list[Turn] = []
    num_blocks = 0
    for row in given["turns"]:
        turns.append(_turn(row, num_blocks, size))
        num_blocks = turns[-1].keep + len(turns[-1].added)
    parent = given["parent"]
    return Session(
        str(given["session_id"]),
        str(given["user"]),
        None if parent is None else str(parent),
        _time("start_s", given["start_s"]),
        size,
        tuple(turns),
    )


def _turn(row: Any, num_before: int, block_size: int) -> Turn:
    if not (isinstance(row, list) and len(row) == len(TURN)):
        raise ValueError(f"a turn is [{', '.join(TURN)}], not {brief(row)}")
    gap, kind, given, asked, cancel, keep, ranges = row
    turn = Turn(
        _time("gap_s", gap),
        str(kind),
        _count("input_tokens", given, 1),
        _count("output_tokens", asked, 1),
        None if cancel is None else _count("cancel_after", cancel, 1),
        _count("keep", keep, 0),
        _blocks(ranges, given // block_size),
    )
    if turn.keep > num_before:
        raise ValueError(f"keep: {turn.keep} blocks of a prompt that has {num_before}")
    if (turn.keep + len(turn.added)) * block_size > turn.input_tokens:
        raise ValueError(f"input_tokens: {turn.input_tokens} are fewer than its blocks hold")
    return turn


def _blocks(ranges: Any, most: int) -> Blocks:
    """Builds nothing before it knows how much that is."""
    if not (isinstance(ranges, list) and all(map(_is_pair, ranges))):
        raise ValueError(f"blocks: must be a list of [first, count], not {brief(ranges)}")
    total = sum(_count("blocks", count, 1) for _, count in ranges)
    if total > most:
        raise ValueError(f"blocks: {total} are more than the prompt holds")
    if total > MOST_BLOCKS:
        raise ValueError(f"blocks: {total} are more than {MOST_BLOCKS}")
    for first, count in ranges:
        if _count("block id", first, 0) + count > MOST_BLOCK_ID:
            raise ValueError(f"block id: must be below {MOST_BLOCK_ID}: {first + count - 1}")
    parts = [np.arange(first, first + count, dtype=np.int64) for first, count in ranges]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _is_pair(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 2


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: must be a whole number of at least {least}: {brief(value)}")
    if value >= LENGTHS_END:
        raise ValueError(f"{name}: must be below {LENGTHS_END}: {brief(value)}")
    return value


def _time(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: must be a number: {brief(value)}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: must be finite and not negative: {brief(value)}")
    return float(value)
