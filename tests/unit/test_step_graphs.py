# SPDX-License-Identifier: MIT
"""Captured decode steps give the bits of uncaptured ones, in every family; what a replay would miss
is found, and steps filled up write nowhere else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.unit.test_execution_batch import plan
from tokenspeed import _cpu
from tokenspeed.config import EngineConfig
from tokenspeed.engine import part
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.execution import plan_view as pv
from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.recorders import CpuRecorder, Graph, NotCapturableError, Outputs
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.execution.step_graphs import StepGraphs
from tokenspeed.execution.step_tensors import StepBatch
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.models.build import load_model
from tokenspeed.models.causal_lm import CausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NUM_SLOTS, PAGE, PAGES_PER_SLOT = 5, 4, 6
NUM_PAGES = NUM_SLOTS * PAGES_PER_SLOT


class Steps:
    """One model over pages that hold NaN, with or without graphs."""

    def __init__(self, model: CausalLM, sizes: list[int] | None) -> None:
        self.model = model
        self.caches = [
            tuple(
                torch.full((NUM_PAGES + 1, PAGE, *s), torch.nan, dtype=spec.dtype)
                for s in spec.shapes
            )
            for spec in model.cache_specs()
        ]
        self.batcher = Batcher(
            max_num_seqs=NUM_SLOTS,
            max_model_len=PAGE * PAGES_PER_SLOT,
            page_size=PAGE,
            device=CPU,
            scratch_page=NUM_PAGES,
        )
        pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(3)).tolist()
        deltas = [
            (0, slot, index, pages[slot * PAGES_PER_SLOT + index])
            for slot in range(NUM_SLOTS)
            for index in range(PAGES_PER_SLOT)
        ]
        self.batcher.apply_deltas(np.array(deltas, np.int32))
        self.graphs = None
        if sizes is not None:
            recorder = CpuRecorder()
            self.graphs = StepGraphs(self.compute, recorder, max_rows=NUM_SLOTS, sizes=sizes)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensors in self.caches for tensor in tensors]

    def compute(self, batch: ForwardBatch) -> Outputs:
        hidden = self.model.forward(batch, self.caches)
        return hidden, self.model.logits(hidden)

    @torch.inference_mode()
    def run(self, rows: dict[int, tuple[int, list[int]]], *, verify: bool = False) -> list[Tensor]:
        """Rows by slot: where they start, and their ids, of which all but the first may be
        drafts."""
        words = plan(
            [
                (slot, pv.ROW_SAMPLE, start, len(ids), (len(ids) - 1) * verify, 0)
                for slot, (start, ids) in rows.items()
            ],
            [token for _, ids in rows.values() for token in ids],
        )
        view = pv.PlanView(words)
        num_tokens = len(view.tokens)
        if self.graphs is None or len(view.sample_index) < num_tokens:
            outputs = self.compute(self.batcher.build(view).forward)
        else:
            size = self.graphs.size_for(len(rows), num_tokens)
            assert size is not None
            build = self.batcher.build_verify if verify else self.decode
            outputs = self.graphs.run(build(view).forward)
        return [output[:num_tokens].clone() for output in outputs]

    def decode(self, view: pv.PlanView) -> StepBatch:
        assert self.graphs is not None
        size = self.graphs.size_for(view.num_rows, view.num_rows)
        assert size is not None
        return self.batcher.build_decode(view, size)


def steps_of_a_day() -> list[dict[int, tuple[int, list[int]]]]:
    """Prefills, then decode steps of three numbers of rows in turn, past the ends of pages."""
    ids = torch.randint(VOCAB_SIZE, (200,), generator=torch.Generator().manual_seed(5)).tolist()
    lengths = {4: 7, 0: 3, 2: 1}
    steps: list[dict[int, tuple[int, list[int]]]] = [
        {slot: (0, ids[slot : slot + length]) for slot, length in lengths.items()}
    ]
    for at, slots in enumerate([(4, 0, 2), (0,), (2, 4), (4, 2, 0)] * 4):
        steps.append({slot: (lengths[slot], [ids[20 + 3 * at + slot]]) for slot in slots})
        for slot in slots:
            lengths[slot] += 1
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_replays_give_the_same_bits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    make_checkpoint(tmp_path, family)
    model = load_model(tmp_path, dtype, CPU, 64)
    plain, exact = Steps(model, None), Steps(model, [])
    for rows in steps_of_a_day():
        want = plain.run(rows)
        assert not any(output.isnan().any() for output in want)
        for got, expected in zip(exact.run(rows), want, strict=True):
            assert torch.equal(got, expected)
    assert exact.graphs is not None
    assert exact.graphs.num_replays >= 15
    assert exact.graphs.num_captured == 1
    for kept, other in zip(exact.tensors(), plain.tensors(), strict=True):
        assert torch.equal(kept.nan_to_num(7), other.nan_to_num(7))
    assert all(tensor[NUM_PAGES].isnan().all() for tensor in exact.tensors())


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_of_steps_that_verify_give_the_same_bits(tmp_path: Path, family: str) -> None:
    """Their rows share out the tokens in other ways at each replay, and go back behind drafts."""
    make_checkpoint(tmp_path, family)
    model = load_model(tmp_path, torch.float32, CPU, 64)
    plain, exact = Steps(model, None), Steps(model, [])
    ids = torch.randint(VOCAB_SIZE, (400,), generator=torch.Generator().manual_seed(6)).tolist()
    starts = {1: 9, 3: 2, 0: 0}
    prompts = {slot: (0, ids[:start]) for slot, start in starts.items() if start}
    steps = [(prompts, False)]
    for at, counts in enumerate([(1, 4, 2), (5, 1, 1), (1, 1, 5), (2, 3, 2), (1, 1, 1)] * 2):
        begin = 17 * at
        rows = {}
        for slot, count in zip(starts, counts, strict=True):
            rows[slot] = (starts[slot], ids[begin : begin + count])
            starts[slot] += (count + 1) // 2  # some are kept
            begin += count
        steps.append((rows, True))
    for rows, verify in steps:
        want = plain.run(rows, verify=verify)
        assert not any(output.isnan().any() for output in want)
        for got, expected in zip(exact.run(rows, verify=verify), want, strict=True):
            assert torch.equal(got, expected)
    assert exact.graphs is not None
    assert exact.graphs.num_replays == 8
    assert exact.graphs.num_captured == 2  # one with a token in each row
    for kept, other in zip(exact.tensors(), plain.tensors(), strict=True):
        assert torch.equal(kept.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_fill_up_change_nothing(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family)
    model = load_model(tmp_path, torch.float32, CPU, 64)
    plain, filled = Steps(model, None), Steps(model, [2, 4])
    for rows in steps_of_a_day():
        for got, expected in zip(filled.run(rows), plain.run(rows), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert filled.graphs is not None
    assert filled.graphs.num_replays >= 13
    for kept, other in zip(filled.tensors(), plain.tensors(), strict=True):
        got, expected = kept[:NUM_PAGES], other[:NUM_PAGES]  # NaN wherever nobody wrote
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def answers(folder: Path, **options: Any) -> dict[int, list[int]]:
    """Seven requests that come and go, in seats for four."""
    config = EngineConfig.of(
        model=str(folder), max_num_seqs=4, max_model_len=64, page_size=4, num_pages=60, **options
    )
    engine = build_engine(config, folder=folder)
    for i in range(7):
        params = SamplingParams(max_tokens=3 + 2 * i, temperature=0.8 * (i % 2), seed=i)
        engine.add_request(GenerateRequest(i, list(range(i + 1, 3 * i + 4)), params))
    found: dict[int, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    engine.close()
    return found


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_an_engine_answers_the_same_with_graphs(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, family)
    want = answers(tmp_path, enforce_eager=True)
    assert answers(tmp_path) == want
    assert answers(tmp_path, overlap_depth=1) == want
    # As on a GPU: sizes captured beforehand, to which steps are filled up.
    monkeypatch.setattr(part, "graph_sizes", lambda config, device: [1, 3, 4])
    assert answers(tmp_path) == want
    assert answers(tmp_path, overlap_depth=1) == want


def test_sizes_on_a_gpu() -> None:
    gpu = torch.device("cuda", 0)
    assert part.graph_sizes(EngineConfig.of(), CPU) == []
    assert part.graph_sizes(EngineConfig.of(enforce_eager=True), gpu) == []
    assert part.graph_sizes(EngineConfig.of(max_num_seqs=20), gpu) == [1, 2, 4, 8, 16, 20]
    assert part.graph_sizes(EngineConfig.of(cuda_graph_max_bs=3), gpu) == [1, 2, 3]
    assert part.graph_sizes(EngineConfig.of(cuda_graph_max_bs=1), gpu) == [1]
    graphs = StepGraphs(Toy().compute, CpuRecorder(), max_rows=20, sizes=[1, 2, 4, 8])
    assert [graphs.size_for(n, n) for n in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, None]


class Toy:
    """Some numbers a row; `flaw` is what is wrong with how they come about."""

    def __init__(self, flaw: str = "") -> None:
        self.flaw, self.x = flaw, torch.ones(40, 8)
        self.weight = torch.ones(8)

    def compute(self, batch: Any) -> Outputs:
        x = self.x[: len(batch.slots)]
        if self.flaw == "torch":
            x = x * 2
        if self.flaw == "copy":
            x = x.t().flatten().view_as(x)
        if self.flaw == "numpy":  # no op of torch: only the numbers tell
            x = torch.from_numpy(x.numpy() * 2)
        y = _cpu.add(x, x)
        if self.flaw == "halves":
            return y, _cpu.rms_norm(y.view(-1, 4), self.weight[:4], 1.0)
        return y, x if self.flaw == "input" else _cpu.rms_norm(y, self.weight, 1.0)


class Rows:
    def __init__(self, count: int) -> None:
        self.slots = self.token_ids = range(count)


def run_toy(flaw: str, caplog: pytest.LogCaptureFixture) -> StepGraphs:
    toy = Toy(flaw)
    graphs = StepGraphs(toy.compute, CpuRecorder(), max_rows=4)
    for step in range(5):
        toy.x.fill_(step + 1)
        size = graphs.size_for(3, 3)
        if size is None:
            break
        got = graphs.run(Rows(size))  # type: ignore[arg-type]
        for output, expected in zip(got, toy.compute(Rows(3)), strict=True):
            assert torch.equal(output, expected)
    return graphs


def test_graphs_are_kept_where_they_are_right(caplog: pytest.LogCaptureFixture) -> None:
    assert run_toy("", caplog).size_for(3, 3) == 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("flaw", "why"),
    [
        ("torch", "aten.mul"),
        ("copy", "aten.clone"),
        ("numpy", "other numbers"),
        ("input", "not a kernel's"),
    ],
)
def test_what_a_replay_misses_ends_graphs(
    flaw: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_toy(flaw, caplog).size_for(3, 3) is None
    assert [why in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(("flaw", "num_captured", "num_checked"), [("", 2, 5), ("halves", 5, 4)])
def test_a_captured_step_serves_others(flaw: str, num_captured: int, num_checked: int) -> None:
    """With more rows and with fewer, as far as it has room; not if a call's shape forbids it."""
    toy = Toy(flaw)
    graphs = StepGraphs(toy.compute, CpuRecorder(), max_rows=40)
    for step, count in enumerate([3, 16, 1, 3, 40, 16, 17, 1, 40]):
        toy.x.copy_(torch.arange(320).view(40, 8) * (step + 1))
        got = graphs.run(Rows(count))  # type: ignore[arg-type]
        for output, expected in zip(got, toy.compute(Rows(count)), strict=True):
            assert torch.equal(output, expected)
    assert graphs.num_captured == num_captured
    assert graphs.num_slow == num_captured + num_checked  # each size but once


def test_memory_does_not_grow_with_the_number_of_graphs() -> None:
    recorder, x = CpuRecorder(), torch.ones(64, 1024)

    def body(rows: int) -> Outputs:
        y = _cpu.add(x[:rows], x[:rows])
        for _ in range(5):
            y = _cpu.add(y, y)
        return (y,)

    graphs = [recorder.capture(lambda: body(64), 64, 64)]
    whole = recorder.num_bytes
    sizes = [64, *range(1, 64)]
    graphs += [recorder.capture(lambda rows=rows: body(rows), rows, rows) for rows in sizes[1:]]
    assert recorder.num_bytes <= 2 * whole
    for rows, graph in zip(sizes, graphs, strict=True):
        (output,) = graph.replay(rows, rows)
        assert torch.equal(output, torch.full((rows, 1024), 64.0))


def test_a_failed_capture_leaves_no_recording_open() -> None:
    recorder, one = CpuRecorder(), torch.ones(1, 1)
    with pytest.raises(NotCapturableError, match=r"aten\.mul"):
        recorder.capture(lambda: (one * 2,), 1, 1)
    graph: Graph = recorder.capture(lambda: (_cpu.add(one, one),), 1, 1)
    assert graph.outputs[0].item() == 2


def test_values_are_checked_at_each_replay() -> None:
    ids, table = torch.tensor([1], dtype=torch.int32), torch.ones(3, 2)
    q, cache = torch.ones(1, 1, 2), torch.zeros(1, 4, 1, 2)
    places = torch.zeros(1, dtype=torch.int64)

    def body() -> Outputs:
        return (_cpu.rope_append_gqa(q, q, q, table, ids, places, cache, cache, False),)

    graph = CpuRecorder().capture(body, 1, 1)
    ids[0] = 3
    with pytest.raises(ValueError, match=r"positions: an index is not in \[0, 3\)"):
        graph.replay(1, 1)
    ids[0], places[0] = 2, 4
    with pytest.raises(ValueError, match=r"cache_index: an index is not in \[0, 4\)"):
        graph.replay(1, 1)
