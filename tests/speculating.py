# SPDX-License-Identifier: MIT
"""A `Speculator` over drafters that are told what to say, and plans made by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenspeed.engine.depths import Depths
from tokenspeed.engine.speculator import Speculator, Weighted
from tokenspeed.engine.step_times import Experts, StepTimes
from tokenspeed.execution.plan_view import (
    HEADER_WORDS,
    LAYOUT_VERSION,
    PLAN_MAGIC,
    ROW_SAMPLE,
    PlanView,
)
from tokenspeed.execution.speculation.drafter import Proposal

PROMPT = np.arange(5, dtype=np.int32)
Row = tuple[int, int, int, int]  # slot, flags, num_draft, num_propose


class Oracle:
    """Proposes what it was told to, and remembers what it was asked."""

    def __init__(self, name: str = "oracle", match_len: int = 4) -> None:
        self.name, self.match_len = name, match_len
        self.next: dict[int, list[int]] = {}
        self.seen: dict[int, list[int]] = {}
        self.salts: dict[int, bytes] = {}
        self.num_asked = 0

    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        self.seen[request_id], self.salts[request_id] = prompt_ids.tolist(), salt

    def extend(
        self,
        request_ids: NDArray[np.uint64],
        num_ids: NDArray[np.int32],
        ids: NDArray[np.int32],
    ) -> list[int]:
        ends = num_ids.cumsum()
        for request_id, given in zip(request_ids.tolist(), np.split(ids, ends), strict=False):
            self.seen[request_id] += given.tolist()
        return [self.match_len] * len(request_ids)

    def propose(self, request_id: int, max_tokens: int) -> Proposal:
        self.num_asked += 1
        return Proposal(self.next.get(request_id, [])[:max_tokens], self.match_len)

    def remove(self, request_id: int) -> None:
        del self.seen[request_id]

    def forget_ended(self) -> None:
        self.salts.clear()


class Told:
    """What the scheduler was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int], int]] = []

    def speculate(self, request_id: int, draft: NDArray[np.int32], num_propose: int) -> bool:
        assert draft.dtype == np.int32
        self.calls.append((request_id, draft.tolist(), num_propose))
        return True

    def take(self) -> list[tuple[int, list[int], int]]:
        calls, self.calls = self.calls, []
        return calls


def plan(rows: Sequence[Row], binds: dict[int, int] | None = None) -> PlanView:
    """A plan of decoding rows; `binds` are request ids by slot."""
    table, tokens = [], 0
    for slot, flags, num_draft, num_propose in rows:
        table.append([slot, flags, 5, 1 + num_draft, num_draft, tokens, num_propose])
        tokens += 1 + num_draft
    bound = [[slot, request_id, 0, 5] for slot, request_id in (binds or {}).items()]
    size = HEADER_WORDS + 7 * len(rows) + tokens + 4 * len(bound)
    counts = [len(rows), tokens, 0, 0, len(bound)]
    only_decodes = all(row[1:] == (ROW_SAMPLE, 0, 0) for row in rows)
    head = [PLAN_MAGIC, LAYOUT_VERSION, size, 0, 0, *counts, only_decodes, *[0] * 5]
    words = [*head, *sum(table, []), *[1] * tokens, *sum(bound, [])]  # noqa: RUF017
    return PlanView(np.array(words, np.int32))


class Harness:
    """A speculator, and the steps around it: request i has slot i."""

    def __init__(self, *drafters: Oracle, depth: int = 4, **options: Any) -> None:
        self.it = Speculator(drafters, depth=depth, **options)
        depths = options.get("depths")
        self.times = None if depths is None else depths.times
        self.told = Told()
        self.now = 100.0
        self.bound: set[int] = set()
        self.dozed = False  # in the latest step

    def prepared(self) -> list[tuple[int, list[int], int]]:
        self.it.prepare(self.told)
        return self.told.take()

    def launch(self, **rows: tuple[int, int]) -> None:
        """`r3=(num_draft, num_propose)`."""
        numbers = {int(name[1:]): row for name, row in rows.items()}
        new = {i: i for i in numbers if i not in self.bound}
        self.bound.update(new)
        made = plan([(i, ROW_SAMPLE, *row) for i, row in numbers.items()], new)
        self.dozed = self.it.dozes([made], self.now - 100)
        if self.dozed:
            return
        self.it.launched([made])
        if self.times is not None:
            self.times.launched([made], self.now)

    def extend(self, request_id: int, ids: list[int], proposed: Sequence[int] = ()) -> None:
        heard = [request_id], [len(ids)], ids
        self.it.extend(heard, {request_id: proposed} if proposed else {})

    def land(self, seconds: float, **ids: list[int]) -> None:
        for name, given in ids.items():
            self.extend(int(name[1:]), given)
        self.now += seconds
        if self.dozed:
            return
        if self.times is not None:
            self.times.committed(self.now)
        self.it.committed(self.now - 100)

    def start(self, *request_ids: int) -> None:
        """These have their first id, 10, and nothing was drafted."""
        for request_id in request_ids:
            self.it.add(request_id, PROMPT, b"")
        self.it.prepare(self.told)
        self.launch(**{f"r{i}": (0, 0) for i in request_ids})
        self.land(0.01, **{f"r{i}": [10] for i in request_ids})
        self.told.take()


def adaptive(*drafters: Oracle, weighted: Weighted | None = None, depth: int = 8) -> Harness:
    depths = Depths(len(drafters) + (weighted is not None), 1000, StepTimes(Experts()))
    return Harness(*drafters, depth=depth, weighted=weighted, depths=depths)


def run(h: Harness, drafter: Oracle, steps: int, *, right: bool, per_draft: float) -> list[int]:
    """Steps of 10 ms, and some for each draft token; the depths that were chosen."""
    depths, token = [], 100
    for _ in range(steps):
        drafter.next[1] = list(range(token, token + 8)) if right else [7] * 8
        told = h.prepared()
        depth = len(told[0][1]) if told else 0
        depths.append(depth)
        h.launch(r1=(depth, 0))
        given = list(range(token, token + 1 + (depth if right else 0)))
        h.land(0.01 + per_draft * depth, r1=given)
        token += len(given)
    return depths
