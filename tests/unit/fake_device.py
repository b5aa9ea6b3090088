# SPDX-License-Identifier: MIT
"""A device of arithmetic: the next token is a hash of the tokens that stand in the pages it reads.

It applies a Plan as execution does, so a wrong page, delta, position or reuse changes the output.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tokenspeed import _scheduler


class Row(NamedTuple):
    slot: int
    flags: int
    start: int
    num_tokens: int
    num_draft: int
    token_offset: int
    num_propose: int


def next_token(tokens: list[int]) -> int:
    """The fake model: a polynomial hash of the whole prefix."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % 1000


def expected_output(prompt: np.ndarray, num_tokens: int) -> list[int]:
    """What the model says after `prompt` without any scheduler."""
    tokens = [int(token) for token in prompt]
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeDevice:
    """Runs a scheduler's plans; checks its invariants after every call.

    `depth` steps stay in flight while another is planned: overlap_depth + num_micro_steps - 1.
    """

    def __init__(
        self,
        scheduler: _scheduler.Scheduler,
        depth: int,
        page_size: int = 4,
        fails: Callable[[int, int], bool] = lambda request, start: False,
    ) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.page_size = page_size
        self.fails = fails
        self.pages: dict[tuple[int, int], int] = {}  # page, offset -> token
        self.table: dict[tuple[int, int], int] = {}  # slot, index -> page
        self.bound: dict[int, int] = {}  # slot -> request
        self.last: dict[int, int] = {}  # slot -> last sampled id
        self.plans: list[np.ndarray] = []
        self.rows: list[Row] = []
        self.in_flight: deque[np.ndarray] = deque()
        self.outputs: dict[int, list[int]] = {}
        self.finish: dict[int, int] = {}
        self.num_cached: dict[int, int] = {}
        self.receipts: dict[int, tuple[int, int]] = {}  # request -> MISS_*, microseconds kept
        self.pages_of: dict[int, list[int]] = {}  # request -> pages of its last row, from its start
        self.first_row: dict[int, int] = {}  # request -> number of plans made before

    def run(self, max_steps: int = 10_000) -> None:
        while self.scheduler.has_work():
            self.step()
            max_steps -= 1
            assert max_steps > 0, "the scheduler makes no progress"

    def step(self) -> None:
        plan = self.scheduler.next_plan()
        self.scheduler.check_invariants()
        if plan is not None:
            self.in_flight.append(self.compute(plan))
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.commit_oldest()

    def compute(self, plan: np.ndarray) -> np.ndarray:
        self.plans.append(plan)
        num_rows, num_tokens, num_deltas, num_copies, num_binds = plan[5:10].tolist()
        assert plan[2] == len(plan)
        assert num_copies == 0
        at = 16
        rows = [Row(*row) for row in plan[at : at + 7 * num_rows].reshape(-1, 7).tolist()]
        at += 7 * num_rows
        tokens = plan[at : at + num_tokens].tolist()
        at += num_tokens
        for group, slot, index, page in plan[at : at + 4 * num_deltas].reshape(-1, 4).tolist():
            assert group == 0
            self.table[slot, index] = page
        for slot, low, high, _ in plan[at + 4 * num_deltas :].reshape(num_binds, 4).tolist():
            self.bound[slot] = (low & 0xFFFFFFFF) | high << 32
        self.rows += rows
        for row in rows:
            self.first_row.setdefault(self.bound[row.slot], len(self.plans))
        return self._result(plan, rows, tokens)

    def _result(self, plan: np.ndarray, rows: list[Row], tokens: list[int]) -> np.ndarray:
        words: list[int] = []
        ids: list[int] = []
        for row in rows:
            given = tokens[row.token_offset : row.token_offset + row.num_tokens]
            for i, token in enumerate(given):
                value = self.last[row.slot] if token == -1 else token
                self.pages[self._place(row.slot, row.start + i)] = value
            end = row.start + row.num_tokens
            self.pages_of[self.bound[row.slot]] = [
                self.table[row.slot, i] for i in range(-(-end // self.page_size))
            ]
            failed = self.fails(self.bound[row.slot], row.start)
            words += [row.slot, int(failed), int(bool(row.flags & 1) and not failed)]
            if row.flags & 1:
                seen = [self.pages[self._place(row.slot, i)] for i in range(end)]
                self.last[row.slot] = next_token(seen)
                ids += [] if failed else [self.last[row.slot]]
        header = [
            0x53525354,
            int(plan[1]),
            8 + len(words) + len(ids),
            plan[3],
            plan[4],
            len(rows),
            len(ids),
            0,
        ]
        return np.array(header + words + ids, np.int32)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.table[slot, position // self.page_size], position % self.page_size

    def commit_oldest(self) -> None:
        updates = self.scheduler.commit(self.in_flight.popleft())
        self.scheduler.check_invariants()
        ids = updates.ids.tolist()
        for request, miss, kept_us in zip(
            updates.receipt_ids.tolist(),
            updates.receipt_miss.tolist(),
            updates.receipt_kept_us.tolist(),
            strict=True,
        ):
            assert request not in self.outputs, "a receipt comes with the first update"
            self.receipts[request] = (miss, kept_us)
        for request, finish, count, cached in zip(
            updates.request_ids.tolist(),
            updates.finish.tolist(),
            updates.num_ids.tolist(),
            updates.num_cached.tolist(),
            strict=True,
        ):
            self.outputs.setdefault(request, []).extend(ids[:count])
            ids = ids[count:]
            self.num_cached[request] = cached
            if finish:
                assert request not in self.finish
                self.finish[request] = finish
        assert not ids
