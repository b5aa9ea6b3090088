# SPDX-License-Identifier: MIT
"""What a step that verifies leaves for a drafter, on every rank, and what faults at drafts do."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drafted_run import CPU, DraftedRun, Row, request
from tests.fake_model import FakeModel
from tests.unit.test_execution_batch import batcher, plan
from tokenspeed.execution import plan_view as pv
from tokenspeed.execution.batch import MAX_VERIFY_ROW, Batcher
from tokenspeed.execution.kv_cache import KVCache
from tokenspeed.execution.sampler import Sampled, Sampler, kept
from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.execution.step import Begun, Results, Step
from tokenspeed.execution.step_runner import StepRunner
from tokenspeed.kernels.sample import verify
from tokenspeed.spmd.simulate import VirtualCommunicator, run_ranks

VOCAB = 101
PROMPTS = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5, 6, 7]]


class Dice:
    """Proposes by the sampler's noise over flat logits, two tokens at most, the last row one."""

    name, max_depth, num_slow = "dice", 3, 0

    def __init__(self) -> None:
        self.cache_specs: list[Any] = []
        self.bound: list[int] = []
        self.works: list[DraftWork] = []
        self.drafts: list[torch.Tensor] = []

    def bind(self, slots: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self.bound += slots.tolist()

    def skips(self, *, asked: bool) -> bool:
        return False

    def draft(self, work: DraftWork) -> torch.Tensor:
        self.works.append(work)
        rows = np.flatnonzero((work.accepted > 0) & (work.num_propose > 0))
        found = torch.full((len(work.accepted), 3), -1)
        slots = work.batch.forward.slots.numpy()[rows]
        for at in range(2):
            places = work.batch.forward.kv_len[rows].long() + at
            flat = torch.zeros(len(rows), VOCAB)
            found[torch.from_numpy(rows), at] = work.sample(flat, slots, places)
        found[-1, 1] = -1
        self.drafts.append(found)
        return found


def run_of(drafter: Dice | None = None, **options: Any) -> DraftedRun:
    model = FakeModel(VOCAB)
    model.fail_on = options.pop("fail_on", None)
    requests = [
        request(prompt, seed=i, max_tokens=9, temperature=0.8 * (i % 2), **options)
        for i, prompt in enumerate(PROMPTS)
    ]
    return DraftedRun(model, requests, chunk=4, drafter=drafter)


def right_then_wrong(ids: list[list[int]], num_right: int = 2) -> Any:
    def draft(row: Row) -> list[int]:
        known = len(row.request.output_ids)
        coming = ids[row.number][known : known + num_right]
        return [*coming, (ids[row.number][-1] + 1) % VOCAB]

    return draft


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return [ids for ids, _, _ in run_of().run()]


def test_what_a_drafter_is_told(plain: list[list[int]]) -> None:
    dice = Dice()
    run = run_of(dice)
    assert [ids for ids, _, _ in run.run(right_then_wrong(plain), propose=3)] == plain
    assert sorted(dice.bound) == [0, 1, 2]
    assert len(dice.works) == len(run.steps)
    for (step, output), work, drafts in zip(run.steps, dice.works, dice.drafts, strict=True):
        view = step.plan
        assert view is not None
        rows, at = output.words[8 : 8 + 3 * view.num_rows].reshape(-1, 3), 8 + 3 * view.num_rows
        assert work.accepted.tolist() == rows[:, 2].tolist()
        assert work.row_sample.tolist() == (view.flags & pv.ROW_SAMPLE > 0).tolist()
        assert len(work.hidden) == len(work.ids) == len(view.tokens)
        ends = np.cumsum(view.num_tokens)
        for row, (end, places, count) in enumerate(
            zip(ends, view.num_places, rows[:, 2], strict=True)
        ):
            first = end - places
            assert (
                work.ids[first : first + count].tolist() == output.words[at : at + count].tolist()
            )
            proposed = [token for token in drafts[row].tolist() if token >= 0]
            assert output.drafts.get(step.owners[row], []) == proposed
            at += count


def test_all_ranks_draft_the_same(plain: list[list[int]]) -> None:
    alone = run_of()
    alone.run(right_then_wrong(plain), propose=3)

    def work(communicator: VirtualCommunicator) -> tuple[Dice, list[Any]]:
        model, dice = FakeModel(VOCAB), Dice()
        run = DraftedRun(model, [request(prompt) for prompt in PROMPTS], chunk=4)
        cache = KVCache(model.cache_specs(), num_pages=72, page_size=4, device=CPU)
        sampler = run.runner._sampler if communicator.rank == 0 else None
        runner = StepRunner(
            model, cache, run.batcher, sampler, peers=communicator.group([(0, 1)]), drafter=dice
        )
        return dice, [runner.run(step) for step, _ in alone.steps]

    (first, outputs), (second, nothing) = run_ranks(2, work)
    assert nothing == [None] * len(alone.steps)
    for output, (_, expected) in zip(outputs, alone.steps, strict=True):
        assert output.words.tolist() == expected.words.tolist()
    assert any((drafts >= 0).any() for drafts in first.drafts)
    for a, b in zip(first.drafts, second.drafts, strict=True):
        assert torch.equal(a, b)
    for one, other in zip(first.works, second.works, strict=True):
        assert one.accepted.tolist() == other.accepted.tolist()
        assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("right", [2, 5])
def test_a_fault_at_a_draft_ends_the_request_where_it_would_have(
    plain: list[list[int]], right: int
) -> None:
    elsewhere = {*plain[0], *plain[2], *(token for prompt in PROMPTS for token in prompt)}
    poison = next(token for token in plain[1][3:-2] if token not in elsewhere)
    want = [ids for ids, _, _ in run_of(fail_on=poison).run()]
    assert want[0] == plain[0]
    assert want[1] == plain[1][: plain[1].index(poison) + 1]
    run = run_of(fail_on=poison)
    assert [ids for ids, _, _ in run.run(right_then_wrong(plain, right))] == want


def mind(sampler: Sampler) -> None:
    sampler.bind(
        0, request([1], frequency_penalty=1.0, bad_words_token_ids=[[4, 3]], logprobs=1), [4]
    )


def test_a_fault_that_passes_leaves_nothing_behind() -> None:
    """The place is sampled again in the next step, from the same state."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[1, [0, 7]] = torch.tensor([9.0, 8.5])  # a 0 counted by mistake would lose
    slots, places = np.array([0], np.int32), torch.arange(5, 8)
    sampler = Sampler(max_num_seqs=1, vocab_size=VOCAB, device=CPU)
    mind(sampler)
    want = [int(sampler.sample(logits[[i]].clone(), slots, places[[i]])[0]) for i in range(3)]
    mind(sampler)
    tokens = torch.tensor([4, *want[:2]])
    starts = torch.tensor([0, 3], dtype=torch.int32)
    faulty = logits.clone()
    faulty[1, 8] = torch.nan
    found = sampler.verify(faulty, slots, np.array([3], np.int32), starts, tokens, places)
    assert found.counts is not None
    assert found.counts.tolist() == [1]
    assert found.ids.tolist() == [want[0], -1, -1]
    assert len(found.logprobs[0]) == 1
    again = sampler.verify(
        logits[1:], slots, np.array([2], np.int32), starts.clamp(max=2), tokens[1:], places[1:]
    )
    assert again.ids.tolist() == want[1:]


def test_rows_that_mind_and_rows_that_do_not() -> None:
    """Ragged rows of both kinds, one that does not sample; drafts of the first are wrong at 1."""
    sampler = Sampler(max_num_seqs=4, vocab_size=VOCAB, device=CPU)
    for slot in range(4):
        sampler.bind(slot, request([1], logprobs=0 if slot == 1 else None, temperature=0.0), [])
    logits = torch.zeros(6, VOCAB)
    ids = [10, 11, 12, 20, 21, 30]
    logits[torch.arange(6), ids] = 1.0
    tokens = torch.tensor([9, 10, 77, 9, 20, 9])
    found = sampler.verify(
        logits,
        np.array([2, 3, 1, 0], np.int32),
        np.array([3, 0, 2, 1], np.int32),
        torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32),
        tokens,
        torch.arange(6),
    )
    assert found.counts is not None
    assert found.counts.tolist() == [2, 0, 2, 1]
    assert found.ids.tolist() == ids
    assert [entry.token_ids for entry in found.logprobs[2]] == [[20], [21]]
    assert found.logprobs.keys() == {2}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_host_counts_as_the_kernel_does(data: st.DataObject) -> None:
    num_places = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1)), np.int32)
    count = int(num_places.sum())
    several = st.lists(st.integers(-1, 1), min_size=count, max_size=count)
    ids, tokens = (np.array(data.draw(several), np.int64) for _ in range(2))
    tokens = np.abs(tokens)
    starts = np.concatenate([[0], num_places.cumsum()]).astype(np.int32)
    told = verify(torch.from_numpy(ids), torch.from_numpy(tokens), torch.from_numpy(starts))
    want = [
        n - (n > 0 and ids[at + n - 1] < 0)
        for at, n in zip(starts[:-1], told.tolist(), strict=True)
    ]
    assert kept(ids, tokens, num_places).tolist() == want


# -- tensors and results


VERIFY = plan(
    rows=[
        (1, pv.ROW_SAMPLE, 5, 3, 2, 4),
        (0, pv.ROW_PREFILL, 0, 2),
        (2, pv.ROW_SAMPLE | pv.ROW_PREFILL, 3, 2),
    ],
    tokens=[10, 11, 12, 20, 21, 30, 31],
    deltas=[(0, 1, 1, 3), (0, 0, 0, 4), (0, 2, 0, 5), (0, 2, 1, 6)],
)


def test_where_a_plan_samples() -> None:
    view = pv.PlanView(VERIFY)
    assert view.num_places.tolist() == [3, 0, 1]
    assert view.sample_index.tolist() == [0, 1, 2, 6]
    none = pv.PlanView(plan([(0, 0, 0, 2)], [1, 2]))
    assert none.sample_index.tolist() == []
    assert pv.PlanView(plan([], [])).sample_index.tolist() == []


def test_tensors_of_a_step_that_verifies() -> None:
    view, made = pv.PlanView(VERIFY), batcher()
    made.apply_deltas(view.deltas)
    batch = made.build(view)
    assert batch.forward.logits_index.tolist() == [0, 1, 2, 6]
    assert batch.places.tolist() == [6, 7, 8, 5]
    assert batch.logits_start.tolist() == [0, 3, 3, 4]
    assert batch.forward.cache_index.tolist() == [13, 14, 15, 16, 17, 23, 24]
    assert batch.forward.kv_len.tolist() == [8, 2, 5]


def test_memory_of_steps_that_verify_stays() -> None:
    made: Batcher = batcher()
    pages = np.array([(0, slot, i, 5 * slot + i) for slot in range(4) for i in range(5)], np.int32)
    made.apply_deltas(pages)
    steps = [[(1, 5, 3), (0, 2, 1)], [(3, 0, 2), (2, 7, 2)], [(3, 1, 4)]]
    memory = []
    for rows in steps:
        words = plan(
            [(slot, pv.ROW_SAMPLE, start, count, count - 1, 0) for slot, start, count in rows],
            list(range(sum(count for *_, count in rows))),
        )
        view = pv.PlanView(words)
        assert made.keeps_verify(view)
        got, want = made.build_verify(view), made.build(view)
        for name in ("token_ids", "positions", "cache_index", "q_start", "kv_len", "slots"):
            assert torch.equal(getattr(got.forward, name), getattr(want.forward, name)), name
        assert torch.equal(got.forward.logits_index, want.forward.logits_index)
        assert torch.equal(got.places, want.places)
        assert torch.equal(got.logits_start, want.logits_start)
        assert want.forward.max_q_len <= got.forward.max_q_len == MAX_VERIFY_ROW
        memory.append(got.forward.token_ids.data_ptr())
    assert len(set(memory)) == 1
    long = pv.PlanView(plan([(0, pv.ROW_SAMPLE, 0, 65, 64, 0)], [1] * 65))
    assert not made.keeps_verify(long)


def finish(ids: list[int], counts: list[int] | None, bad: list[int]) -> tuple[list[int], list[int]]:
    """Statuses and accepted counts of VERIFY's rows, then ids, where these tokens' sums are NaN."""
    sums = torch.zeros(7)
    sums[bad] = torch.nan
    told = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    results = Results(Sampled(torch.tensor(ids), told, {}), sums)
    words = Begun(Step([7]), pv.PlanView(VERIFY), results, {}, {}).finish().words
    return words[8:17].reshape(3, 3)[:, 1:].ravel().tolist(), words[17:].tolist()


def test_only_kept_places_count_for_what_is_not_finite() -> None:
    ids = [11, 12, 13, 40]
    assert finish(ids, [3, 0, 1], []) == ([0, 3, 0, 0, 0, 1], ids)
    assert finish(ids, [1, 0, 1], [1, 2]) == ([0, 1, 0, 0, 0, 1], [11, 40])
    assert finish(ids, [3, 0, 1], [2]) == ([0, 2, 0, 0, 0, 1], [11, 12, 40])
    assert finish(ids, [3, 0, 1], [0]) == ([1, 0, 0, 0, 0, 1], [40])
    assert finish(ids, [3, 0, 1], [4]) == ([0, 3, 1, 0, 0, 1], ids)
    assert finish(ids, [3, 0, 1], [5]) == ([0, 3, 0, 0, 1, 0], ids[:3])
    assert finish([-1, -1, -1, 40], [0, 0, 1], []) == ([1, 0, 0, 0, 0, 1], [40])
