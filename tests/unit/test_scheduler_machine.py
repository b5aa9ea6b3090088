# SPDX-License-Identifier: MIT
"""Hypothesis drives the scheduler through its binding; a model of hashes says what comes out."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.unit.fake_device import FakeDevice, expected_output
from tokenspeed import _scheduler

PAGE_SIZE = 4
MAX_MODEL_LEN = 40


class SchedulerMachine(RuleBasedStateMachine):
    """`FakeDevice` checks the scheduler's invariants after each plan and each commit."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: dict[int, np.ndarray] = {}
        self.limits: dict[int, int] = {}
        self.aborted: set[int] = set()

    @initialize(
        num_pages=st.integers(10, 24),
        seqs=st.integers(1, 4),
        extra=st.integers(0, 12),
        depth=st.integers(0, 1),
        caching=st.booleans(),
    )
    def start(self, num_pages: int, seqs: int, extra: int, depth: int, caching: bool) -> None:
        self.scheduler = _scheduler.Scheduler(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + extra,
            max_model_len=MAX_MODEL_LEN,
            overlap_depth=depth,
            enable_prefix_caching=caching,
            hash_key=bytes(16),
        )
        self.device = FakeDevice(self.scheduler, depth, PAGE_SIZE)

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 30),
        tail=st.integers(0, 9),
        n=st.integers(1, 20),
    )
    def submit(self, family: int, length: int, tail: int, n: int) -> None:
        request_id = len(self.prompts)
        prompt = np.full(length, family, np.int32)
        prompt[-1] = tail
        self.prompts[request_id] = prompt
        self.limits[request_id] = min(n, MAX_MODEL_LEN - length)
        self.scheduler.submit(request_id, prompt, max_tokens=n, salt=bytes([family % 2]))

    @rule(back=st.integers(0, 5))
    def abort(self, back: int) -> None:
        request_id = len(self.prompts) - 1 - back
        over = request_id < 0 or request_id in self.device.finish or request_id in self.aborted
        assert self.scheduler.abort(request_id if request_id >= 0 else 1 << 40) == (not over)
        if request_id >= 0 and not over:
            self.aborted.add(request_id)

    @precondition(lambda self: self.scheduler.has_work())
    @rule(steps=st.integers(1, 5))
    def run_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.device.step()

    @rule()
    def flush(self) -> None:
        self.scheduler.flush_cache()
        self.scheduler.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "device"):
            return
        self.device.run()
        for request_id, prompt in self.prompts.items():
            got = self.device.outputs.get(request_id, [])
            want = expected_output(prompt, self.limits[request_id])
            assert got == want[: len(got)]
            assert request_id in self.aborted or got == want
        stats = self.scheduler.stats()
        assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
