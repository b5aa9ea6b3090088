# SPDX-License-Identifier: MIT
"""Replays recorded expert loads: what balancing would have done. Knows no model and no clock.

A placement is solved from the window of records before it and judged on the records after it,
never on what it has seen:

    records   | 0 1 2 3 | 4 5 6 7 | 8 9 10 11 | ...        interval 4, window 4
    placement | default | of 0..3 | of 4..7   |
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenspeed.spmd.expert_placement import ExpertPlacement, Move
from tokenspeed.spmd.expert_solver import Solver

Recording = NDArray[np.int64]  # [records, layers, experts] tokens routed in each record


@dataclass(frozen=True)
class Interval:
    """The records from `begin` to `end` under one placement. Arrays are [layers].

    "Imbalance" is the heaviest rank's load over the mean of all ranks, for the whole interval.
    """

    begin: int
    end: int
    before: NDArray[np.float64]  # imbalance under the default placement
    after: NDArray[np.float64]  # imbalance under the placement that was in force
    num_moved: int  # slots that changed when the interval began
    num_sent: int  # of these, those whose expert came from another rank


def replay(recording: Recording, solver: Solver, *, interval: int, window: int) -> list[Interval]:
    """`interval` and `window` in records. The first interval has the default placement.

    `ValueError`: a recording of another shape, or sizes below one.
    """
    if recording.ndim != 3 or interval < 1 or window < 1:
        raise ValueError(
            f"a recording is [records, layers, experts]: {recording.shape}; interval and window "
            f"are at least 1: {interval}, {window}"
        )
    default = [solver.default()] * recording.shape[1]
    current: Sequence[ExpertPlacement] = default
    per_rank = solver.default().slots_per_rank
    found = []
    for begin in range(0, len(recording), interval):
        moves: list[Move] = []
        if begin:
            new = solver.solve(recording[max(0, begin - window) : begin].sum(0), current)
            moves = [m for a, b in zip(current, new, strict=True) for m in a.moves_to(b)]
            current = new
        sent = sum(a // per_rank != b // per_rank for a, b in moves)
        end = min(begin + interval, len(recording))
        loads = recording[begin:end].sum(0)
        before, after = _imbalance(default, loads), _imbalance(current, loads)
        found.append(Interval(begin, end, before, after, len(moves), sent))
    return found


def _imbalance(
    placements: Sequence[ExpertPlacement], loads: NDArray[np.int64]
) -> NDArray[np.float64]:
    return np.array([p.imbalance(row) for p, row in zip(placements, loads, strict=True)])


def write_recording(path: Path, recording: Recording) -> None:
    """As compressed .npz, or as .jsonl with one record a line."""
    if path.suffix == ".jsonl":
        lines = (json.dumps({"loads": record.tolist()}) + "\n" for record in recording)
        path.write_text("".join(lines))
        return
    kind = np.min_scalar_type(int(recording.max(initial=0)))
    np.savez_compressed(path, loads=recording.astype(kind))


def read_recording(path: Path) -> Recording:
    """The inverse of `write_recording`. `ValueError` names the file that holds no recording."""
    try:
        if path.suffix == ".jsonl":
            rows: list[Any] = [json.loads(line)["loads"] for line in path.read_text().splitlines()]
            loads = np.array(rows)
        else:
            with np.load(path, allow_pickle=False) as arrays:
                loads = arrays["loads"]
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{path} holds no recording of expert loads: {error}") from error
    if loads.ndim != 3 or not np.issubdtype(loads.dtype, np.integer) or (loads < 0).any():
        raise ValueError(f"{path}: loads must be counts [records, layers, experts]: {loads.shape}")
    return loads.astype(np.int64)
