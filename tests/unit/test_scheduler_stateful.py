# SPDX-License-Identifier: MIT
"""Every call of the scheduler in any order, against what each request must get, word for word.

Unlike the engine's loop it plans and commits at will, lets rows fail, reuses ids, damages results.
The reference knows prompts and hashes; it has no pages, no slots and no batches.
"""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from tokenspeed import _scheduler

PLAN_HEADER, RESULT_HEADER, RESULT_MAGIC = 16, 8, 0x53525354
SAMPLE, NEVER = 1, 10_000
POISON = -99  # what a failed row writes, and what stands in a page before anybody wrote it
VOCAB = 6
Words = NDArray[np.int32]


def next_token(tokens: list[int], salt: bytes) -> int:
    value = 17 + sum(salt)
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCAB


class Spec(NamedTuple):
    """A request as a client sends it. Its rows fail that compute position `fails_at` or later."""

    prompt: list[int]
    max_tokens: int
    min_tokens: int
    stop_ids: list[int]
    salt: bytes
    read_cache: bool
    prompt_logprobs: bool
    fails_at: int
    user: int = 0
    retention_s: float = 0.0
    pinned: bool = False

    def outcome(self, max_model_len: int) -> tuple[list[int], int]:
        """Its tokens and its finish, computed without a scheduler."""
        tokens, count = list(self.prompt), 0
        while True:
            if len(tokens) > self.fails_at:
                return tokens[len(self.prompt) :], _scheduler.FINISH_ERROR
            tokens.append(next_token(tokens, self.salt))
            count += 1
            if count >= self.min_tokens and tokens[-1] in self.stop_ids:
                return tokens[len(self.prompt) :], _scheduler.FINISH_STOP
            if count == self.max_tokens or len(tokens) == max_model_len:
                return tokens[len(self.prompt) :], _scheduler.FINISH_LENGTH


@dataclass
class Life:
    """One submitted request, as far as its client has heard."""

    spec: Spec
    tokens: list[int]
    finish: int
    heard: list[int] = field(default_factory=list)


class Row(NamedTuple):
    slot: int
    flags: int
    start: int
    num_tokens: int
    num_draft: int
    offset: int
    num_propose: int

    @property
    def speculates(self) -> bool:
        return self.num_draft > 0 or self.num_propose > 0


class Step(NamedTuple):
    result: Words
    lives: list[Life]
    pages: list[set[int]]  # of each row
    rows: list[Row]


class Device:
    """Runs plans on pages of (salt, position, token); what it reads decides what it samples."""

    def __init__(self, num_pages: int, page_size: int, num_slots: int, overlaps: bool) -> None:
        self.page_size, self.overlaps = page_size, overlaps
        self.cells: list[list[tuple[bytes, int, int]]] = [
            [(b"", POISON, POISON)] * page_size for _ in range(num_pages)
        ]
        self.tables: list[list[int]] = [[] for _ in range(num_slots)]
        self.bound: list[Life | None] = [None] * num_slots
        self.sampled = [POISON] * num_slots

    def launch(self, plan: Words, live: dict[int, Life], in_flight: deque[Step]) -> Step:
        counts = plan[5:10].tolist()
        widths = (7, 1, 4, 4, 4)
        ends = PLAN_HEADER + np.cumsum([c * w for c, w in zip(counts, widths, strict=True)])
        assert plan[2] == len(plan) == ends[-1]
        assert counts[3] == 0
        rows, tokens, deltas, _, binds = (
            part.reshape(-1, width).tolist()
            for part, width in zip(
                np.split(plan, [PLAN_HEADER, *ends[:-1]])[1:], widths, strict=True
            )
        )
        for slot, low, high, known in binds:
            life = live[(low & 0xFFFFFFFF) | high << 32]
            assert known == len(life.spec.prompt) + len(life.heard)
            self.bound[slot], self.tables[slot] = life, []
        for group, slot, index, page in deltas:
            assert group == 0
            assert index <= len(self.tables[slot])  # below it: that page went back unneeded
            self.tables[slot][index:] = [page]
        words: list[int] = []
        ids: list[int] = []
        step = Step(np.empty(0, np.int32), [], [], [])
        for row in rows:
            at = Row(*row)
            given = [token for (token,) in tokens[at.offset : at.offset + at.num_tokens]]
            status, sampled = self._run(at, given, live, in_flight, step)
            words += [at.slot, status, len(sampled)]
            ids += sampled
        assert len({row.slot for row in step.rows}) == len(rows)
        head = [
            RESULT_MAGIC,
            int(plan[1]),
            RESULT_HEADER + len(words) + len(ids),
            *plan[3:5].tolist(),
        ]
        result = np.array([*head, len(rows), len(ids), 0, *words, *ids], np.int32)
        return step._replace(result=result)

    def _run(
        self,
        row: Row,
        tokens: list[int],
        live: dict[int, Life],
        in_flight: deque[Step],
        step: Step,
    ) -> tuple[int, list[int]]:
        """Computes one row: its status and the ids it gives."""
        slot, start, end = row.slot, row.start, row.start + row.num_tokens
        life, table = self.bound[slot], self.tables[slot]
        assert life is not None
        assert any(life is other for other in live.values())
        assert row.num_draft == 0 or (row.flags, row.num_tokens) == (SAMPLE, 1 + row.num_draft)
        assert -1 not in tokens or (self.overlaps and not row.speculates)
        self._write(row, life, tokens)
        used = set(table[: -(-end // self.page_size)])
        written = set(table[start // self.page_size :]) & used
        for earlier in in_flight:
            for other, others, before in zip(
                earlier.lives, earlier.pages, earlier.rows, strict=True
            ):
                assert other is life or not written & others, "reused under a step in flight"
                plain = self.overlaps and not (row.speculates or before.speculates)
                alike = plain or not before.flags & SAMPLE
                assert other is not life or alike, "in two steps at once"
        step.lives.append(life)
        step.pages.append(used)
        step.rows.append(row)
        firm_end = end - row.num_draft
        failed = firm_end > life.spec.fails_at
        if not row.flags & SAMPLE:
            return int(failed), []
        ids = (
            [POISON]
            if failed
            else self._verify(row, life, tokens[row.num_tokens - row.num_draft :])
        )
        self.sampled[slot] = ids[-1]
        return int(failed), [] if failed else ids

    def _verify(self, row: Row, life: Life, draft: list[int]) -> list[int]:
        """One id, and another one for each draft that is what was sampled."""
        end = row.start + row.num_tokens - row.num_draft
        ids = [self._sample(row.slot, life, end)]
        for place, token in enumerate(draft, 1):
            if token != ids[-1] or end + place > life.spec.fails_at:
                break
            ids.append(self._sample(row.slot, life, end + place))
        return ids

    def _write(self, row: Row, life: Life, tokens: list[int]) -> None:
        slot, start = row.slot, row.start
        fails = start + row.num_tokens - row.num_draft > life.spec.fails_at
        for position, token in enumerate(tokens, start):
            value = self.sampled[slot] if token == -1 else token
            page = self.tables[slot][position // self.page_size]
            failed = fails or position >= life.spec.fails_at
            cell = (life.spec.salt, position, POISON if failed else value)
            self.cells[page][position % self.page_size] = cell

    def _sample(self, slot: int, life: Life, end: int) -> int:
        table, size = self.tables[slot], self.page_size
        read = [self.cells[table[i // size]][i % size] for i in range(end)]
        assert [(salt, position) for salt, position, _ in read] == [
            (life.spec.salt, position) for position in range(end)
        ], "foreign or unwritten content was read"
        tokens = [token for _, _, token in read]
        assert POISON not in tokens
        return next_token(tokens, life.spec.salt)


specs = st.builds(
    Spec,
    prompt=st.integers(1, 14).flatmap(
        lambda n: st.sampled_from([[0], [0], [1], [0, 0, 0, 0, 0, 1]]).map(lambda p: (p * n)[:n])
    ),
    max_tokens=st.integers(2, 14),
    min_tokens=st.integers(0, 2),
    stop_ids=st.sampled_from([[], [], [0], [1, 2]]),
    salt=st.sampled_from([b"", b"", b"tenant"]),
    read_cache=st.sampled_from([True, True, False]),
    prompt_logprobs=st.sampled_from([False, False, True]),
    fails_at=st.sampled_from([NEVER] * 6 + [5, 11]),
    user=st.sampled_from([0, 0, 1, 2**64 - 1]),
    retention_s=st.sampled_from([0.0, 0.0, 1.5, 1e9]),
    pinned=st.sampled_from([False, False, False, True]),
)
MAX_MODEL_LEN = 22


class AnyOrder(RuleBasedStateMachine):
    """The scheduler's whole interface, each call whenever Hypothesis likes."""

    @initialize(
        pages=st.integers(6, 9),
        page_size=st.sampled_from([2, 4]),
        seqs=st.sampled_from([3, 4, 2, 1]),
        extra=st.integers(0, 6),
        mode=st.sampled_from([(0, 1), (1, 1), (0, 2), (0, 3)]),
        caching=st.sampled_from([True, True, False]),
        share=st.sampled_from([0.5, 1.0, 0.0]),
    )
    def start(
        self,
        pages: int,
        page_size: int,
        seqs: int,
        extra: int,
        mode: tuple[int, int],
        caching: bool,
        share: float,
    ) -> None:
        overlap_depth, num_micro_steps = mode
        self.depth = overlap_depth + num_micro_steps - 1
        self.num_pages = pages * 4 // page_size
        self.scheduler = _scheduler.Scheduler(
            num_pages=self.num_pages,
            page_size=page_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + extra,
            max_model_len=MAX_MODEL_LEN,
            overlap_depth=overlap_depth,
            num_micro_steps=num_micro_steps,
            enable_prefix_caching=caching,
            hash_key=bytes(16),
            record_events=True,
            retention_share=share,
        )
        self.now, self.share = 0.0, share
        self.device = Device(self.num_pages, page_size, seqs, overlaps=overlap_depth > 0)
        self.live: dict[int, Life] = {}
        self.in_flight: deque[Step] = deque()
        self.plans: list[Words] = []
        self.sound = True  # False: a plan was wrong, and driving on would hide how
        self.said: list[list[int]] = []  # whole sequences of requests that ended

    def _submit(self, request_id: int, spec: Spec, prompt: Words) -> None:
        self.scheduler.submit(
            request_id,
            prompt,
            max_tokens=spec.max_tokens,
            min_tokens=spec.min_tokens,
            stop_ids=np.array(spec.stop_ids, np.int32),
            salt=spec.salt,
            read_cache=spec.read_cache,
            prompt_logprobs=spec.prompt_logprobs,
            user=spec.user,
            retention_s=spec.retention_s,
            pinned=spec.pinned,
        )

    @rule(request_id=st.sampled_from([0, 1, 2, 3, 1 << 40]), spec=specs)
    def submit(self, request_id: int, spec: Spec) -> None:
        prompt = np.array(spec.prompt, np.int32)
        if request_id in self.live:
            with pytest.raises(ValueError, match="already in use"):
                self._submit(request_id, spec, prompt)
            return
        self._match(spec, prompt)
        self._submit(request_id, spec, prompt)
        self.live[request_id] = Life(spec, *spec.outcome(MAX_MODEL_LEN))

    def _match(self, spec: Spec, prompt: Words) -> None:
        queries = self.scheduler.stats().prefix_queries
        found = self.scheduler.match_prefix(prompt, spec.salt)
        assert 0 <= found < len(prompt)
        assert self.scheduler.stats().prefix_queries == queries

    @rule(burst=st.lists(specs, min_size=2, max_size=4), steps=st.integers(0, 12))
    def submit_burst(self, burst: list[Spec], steps: int) -> None:
        for request_id, spec in zip(range(4, 8), burst, strict=False):
            self.submit(request_id, spec)
        self.work(steps)

    @precondition(lambda self: self.said)
    @rule(request_id=st.integers(0, 3), spec=specs, back=st.integers(1, 3), cut=st.integers(0, 3))
    def submit_next_turn(self, request_id: int, spec: Spec, back: int, cut: int) -> None:
        said = self.said[-min(back, len(self.said))]
        prompt = [*said[: len(said) - cut], 1][-MAX_MODEL_LEN + 2 :]
        self.submit(request_id, spec._replace(prompt=prompt))

    @rule(spec=specs, prompt=st.sampled_from([[], [-1], [1] * MAX_MODEL_LEN]))
    def submit_nonsense(self, spec: Spec, prompt: list[int]) -> None:
        with pytest.raises(ValueError, match="prompt"):
            self._submit(9, spec, np.array(prompt, np.int32))

    @rule(request_id=st.sampled_from([0, 1, 2, 3, 4, 5, 1 << 40, 77]))
    def abort(self, request_id: int) -> None:
        assert self.scheduler.abort(request_id) == (request_id in self.live)
        self.live.pop(request_id, None)

    @rule(
        request_id=st.sampled_from([0, 1, 2, 3, 4, 5, 1 << 40, 77]),
        right=st.integers(0, 9),
        wrong=st.lists(st.integers(0, VOCAB), max_size=3),
        num_propose=st.sampled_from([0, 0, 0, 2]),
    )
    def speculate(self, request_id: int, right: int, wrong: list[int], num_propose: int) -> None:
        life = self.live.get(request_id)
        known = [] if life is None else life.tokens[len(life.heard) :]
        draft = np.array(known[:right] + wrong, np.int32)
        told = self.scheduler.speculate(request_id, draft, num_propose)
        assert told == (life is not None)

    @rule(request_id=st.sampled_from([0, 1]), draft=st.sampled_from([[-1], [3, -2]]))
    def speculate_nonsense(self, request_id: int, draft: list[int]) -> None:
        with pytest.raises(ValueError, match="negative"):
            self.scheduler.speculate(request_id, np.array(draft, np.int32))
        with pytest.raises(ValueError, match="negative"):
            self.scheduler.speculate(request_id, np.empty(0, np.int32), -1)

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 12), right=st.integers(1, 5), wrong=st.booleans())
    def work_with_drafts(self, steps: int, right: int, wrong: bool) -> None:
        for _ in range(steps):
            for request_id in self.live:
                self.speculate(request_id, right, [0] * wrong, 0)
            self.work(1)

    @rule()
    def plan(self) -> None:
        if len(self.in_flight) > self.depth:
            with pytest.raises(ValueError, match="overlap_depth"):
                self.scheduler.next_plan()
            return
        plan = self.scheduler.next_plan()
        assert plan is not None or self.in_flight or not self.live
        if plan is not None:
            self.plans.append(plan)
            self.sound = False
            self.in_flight.append(self.device.launch(plan, self.live, self.in_flight))
            self.sound = True

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self) -> None:
        self.commit_one()

    def commit_one(self) -> None:
        if not self.in_flight:
            return
        updates = self.scheduler.commit(self.in_flight.popleft().result)
        receipts = updates.receipt_ids.tolist()
        for request_id in updates.request_ids.tolist():
            assert (request_id in receipts) == (not self.live[request_id].heard)
        ids = deque(updates.ids.tolist())
        columns = (updates.request_ids, updates.finish, updates.num_ids)
        for request_id, finish, count in zip(*(c.tolist() for c in columns), strict=True):
            life = self.live[request_id]
            life.heard += [ids.popleft() for _ in range(count)]
            assert life.heard == life.tokens[: len(life.heard)]
            if finish == _scheduler.FINISH_NONE:
                assert count >= 1
                continue
            assert (life.heard, finish) == (life.tokens, life.finish)
            self.said.append(life.spec.prompt + life.heard)
            del self.live[request_id]
        assert not ids

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 12))
    def work(self, steps: int) -> None:
        for _ in range(steps):
            if len(self.in_flight) <= self.depth:
                self.plan()
            if len(self.in_flight) > self.depth or not self.live:
                self.commit_one()

    @precondition(lambda self: self.in_flight)
    @rule(at=st.integers(0, 60), value=st.sampled_from([-7, 1 << 30]), cut=st.booleans())
    def commit_damaged(self, at: int, value: int, cut: bool) -> None:
        result = self.in_flight[0].result.copy()
        at %= len(result)
        if at == RESULT_HEADER - 1 or (at >= len(result) - result[6] and value > 0):
            return  # a spare word, or an id that may well be true
        result[at] = value
        with pytest.raises(ValueError, match="commit"):
            self.scheduler.commit(result[:-1] if cut else result)

    @rule()
    def flush(self) -> None:
        self.scheduler.flush_cache()

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 2e9]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.advance(self.now)

    @precondition(lambda self: self.said)
    @rule(
        back=st.integers(1, 3),
        salt=st.sampled_from([b"", b"tenant"]),
        retention_s=st.sampled_from([0.0, 3.0]),
        pinned=st.booleans(),
    )
    def retain(self, back: int, salt: bytes, retention_s: float, pinned: bool) -> None:
        tokens = np.array(self.said[-min(back, len(self.said))], np.int32)
        self.scheduler.retain(tokens, salt, retention_s=retention_s, pinned=pinned)

    @precondition(lambda self: self.said)
    @rule(back=st.integers(1, 3), salt=st.sampled_from([b"", b"tenant"]))
    def release(self, back: int, salt: bytes) -> None:
        tokens = np.array(self.said[-min(back, len(self.said))], np.int32)
        free = self.scheduler.stats().num_free_pages
        count = self.scheduler.release(tokens, salt)
        assert self.scheduler.stats().num_free_pages == free + count

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_invariants()
        stats = self.scheduler.stats()
        assert stats.num_running + stats.num_waiting == len(self.live)
        marked = stats.num_retained_pages + stats.num_pinned_pages
        assert marked <= self.share * self.num_pages
        if self.live or not self.in_flight:
            assert self.scheduler.has_work() == bool(self.live)

    def teardown(self) -> None:
        """The engine's loop ends every request; then nothing is out, and the log says it all."""
        if not hasattr(self, "scheduler") or not self.sound:
            return
        for _ in range(2_000):
            if len(self.in_flight) <= self.depth:
                self.plan()
            self.commit_one()
            if not self.live and not self.in_flight:
                break
        assert not self.live
        assert not self.scheduler.has_work()
        self.scheduler.flush_cache()
        assert self.scheduler.stats().num_free_pages == self.num_pages
        again = _scheduler.replay(self.scheduler.events())
        assert [plan.tobytes() for plan in again] == [plan.tobytes() for plan in self.plans]


AnyOrder.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestAnyOrder = AnyOrder.TestCase


def test_the_control_plane_has_no_threads(repository: Path) -> None:
    """One thread calls it and it starts none, so there is nothing to race with."""
    sources = list((repository / "csrc" / "scheduler").glob("*.*"))
    assert len(sources) > 10
    for path in sources:
        text = path.read_text()
        for word in ("thread", "mutex", "atomic", "future", "condition_variable", "coroutine"):
            assert f"#include <{word}>" not in text, path
        assert "pthread" not in text
        assert "thread_local" not in text
