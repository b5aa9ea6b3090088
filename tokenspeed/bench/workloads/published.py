# SPDX-License-Identifier: MIT
"""The published shape of an agent's session: a long first prompt that grows by a fixed step a turn.

50,000 tokens first, 800 more a turn, 10 to 15 turns, answers of 500: how evalscope's `swe_smith`
is run. Sessions share nothing. Knows no time: each turn follows at once unless `gap_s` is given.
"""

import numpy as np

from tokenspeed.bench.session import Session, Turn, Workload
from tokenspeed.bench.workloads import checks
from tokenspeed.bench.workloads.scaling import scaled

BLOCK_SIZE = 64


def make(
    *,
    sessions: int = 71,
    seed: int = 0,
    scale: float = 1.0,
    span_s: float = 0.0,
    first: int = 50_000,
    growth: int = 800,
    turns: tuple[int, int] = (10, 15),
    output: int = 500,
    gap_s: float = 0.0,
) -> Workload:
    """`growth` is the whole prompt's, the answer before included. Raises ValueError (arguments)."""
    least = {"sessions": sessions, "first": first, "output": output, "turns": turns[0]}
    for name, value in least.items():
        checks.at_least(name, value, 1)
    for name, least_zero in (("growth", growth), ("gap_s", gap_s), ("turns", turns[1] - turns[0])):
        checks.at_least(name, least_zero, 0)
    rng = np.random.default_rng(seed)
    found, num_blocks = [], 0
    for number, start_s in enumerate(checks.starts(rng, sessions, span_s)):
        lengths = [first + growth * i for i in range(int(rng.integers(turns[0], turns[1] + 1)))]
        blocks = range(num_blocks, num_blocks + lengths[-1] // BLOCK_SIZE)
        num_blocks = blocks.stop
        whole = tuple(blocks)
        made = tuple(
            Turn(
                prompt_blocks=whole[: length // BLOCK_SIZE],
                input_tokens=length,
                output_tokens=output,
                gap_s=gap_s if i else 0.0,
                kind="tool" if i else "user",
                tail_tokens=length % BLOCK_SIZE,
            )
            for i, length in enumerate(lengths)
        )
        name = f"published-{number}"
        found.append(Session(name, made, BLOCK_SIZE, start_s, name, None))
    return scaled(Workload("published", tuple(found), seed, 1.0), scale)
