# SPDX-License-Identifier: MIT
"""What share of a workload's input a prefix cache could spare, for ever or with a time to live.

A block is there if the same blocks in front of it and itself were used, by anyone, at most `ttl_s`
before; its use lasts to the end of the answer. Room is never short and computing takes no time: no
server reaches more. Knows only the workload and an assumed speed of answers.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tokenspeed.bench.session import Session, Workload, shared_blocks
from tokenspeed.bench.timeline import TYPICAL, Pace, turn_times

Ints = npt.NDArray[np.int64]


def hit_rates(workload: Workload, ttls_s: Sequence[float], pace: Pace = TYPICAL) -> list[float]:
    """For each time to live, cached over all input tokens. `math.inf` is a cache that keeps all.

    Raises ValueError if a time to live is negative or NaN.
    """
    if not all(ttl >= 0 for ttl in ttls_s):
        raise ValueError(f"a time to live must be at least 0, not among {list(ttls_s)}")
    hits = np.zeros(len(ttls_s), np.int64)
    for _, _, cached in cached_tokens(workload, ttls_s, pace):
        hits += cached
    return [float(hit) / max(1, workload.input_tokens) for hit in hits]


def hit_rate(workload: Workload, ttl_s: float = math.inf, pace: Pace = TYPICAL) -> float:
    return hit_rates(workload, [ttl_s], pace)[0]


def cached_tokens(
    workload: Workload, ttls_s: Sequence[float], pace: Pace = TYPICAL
) -> Iterator[tuple[Session, int, Ints]]:
    """Each turn by the time it is sent: its session, its place there, cached tokens for each TTL.

    At least one token of a prompt is always computed.
    """
    ttls = np.minimum(np.asarray(ttls_s, float), _FOR_EVER)  # what was never used is older
    tree = _Tree()
    paths: dict[int, tuple[tuple[int, ...], Ints]] = {}
    for sent_s, end_s, number, index in _order(workload, pace):
        session = workload.sessions[number]
        turn = session.turns[index]
        path = tree.path(turn.prompt_blocks, session.block_size, *paths.get(number, ((), _NONE)))
        paths[number] = (turn.prompt_blocks, path)
        # A block is used whenever one behind it is: ages never fall along the path.
        there = np.searchsorted(sent_s - tree.used_s[path], ttls, side="right")
        tree.used_s[path] = np.maximum(tree.used_s[path], end_s)
        most = (turn.input_tokens - 1) // session.block_size
        yield session, index, np.minimum(there, most) * session.block_size


def _order(workload: Workload, pace: Pace) -> list[tuple[float, float, int, int]]:
    """Sent, end, session's number and turn's, in the order of sending."""
    return sorted(
        (sent, end, number, index)
        for number, session in enumerate(workload.sessions)
        for index, (sent, end) in enumerate(turn_times(session, pace))
    )


_NONE: Ints = np.zeros(0, np.int64)
_FOR_EVER = 1e300


class _Tree:
    """Every prefix of blocks that was ever sent, as numbers; when each was used last."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}
        self.used_s = np.full(1 << 12, -np.inf)

    def path(self, blocks: tuple[int, ...], size: int, before: tuple[int, ...], path: Ints) -> Ints:
        """The prefixes of a prompt; `path` is that of the prompt `before`, to start from."""
        kept = shared_blocks(before, blocks)
        node = int(path[kept - 1]) if kept else -size  # blocks of another size share nothing
        new = []
        for block in blocks[kept:]:
            node = self._children.setdefault((node, block), len(self._children))
            new.append(node)
        while len(self._children) > len(self.used_s):
            self.used_s = np.concatenate([self.used_s, np.full(len(self.used_s), -np.inf)])
        return np.concatenate([path[:kept], np.asarray(new, np.int64)])
