# SPDX-License-Identifier: MIT
"""Triton's sampling, verification, penalties, logprobs and page copies against the references."""

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels import sample_triton, select
from tokenspeed.kernels.cases import check
from tokenspeed.kernels.cases.sample import settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def draw(logits: Tensor, rule: dict[str, float], backend: str) -> list[int]:
    rows = logits.shape[0]
    seeds = torch.tensor([(-1) ** i * (i << 60) + i for i in range(rows)])
    arguments = (*settings(rows, **rule), seeds, torch.arange(rows) * 1001)  # type: ignore[arg-type]
    run = select("sample", device=DEVICE, backend=backend)
    ids: Tensor = run(logits, *(a.to(DEVICE) for a in arguments))
    return ids.tolist()


def hard_logits(rows: int, vocab: int) -> Tensor:
    """Holes and ties."""
    logits = rand(rows, vocab) * 3
    logits[::3, ::2] = -INF
    logits[::3, 0] = 0.5
    logits[1::4] = logits[1::4].round()
    return logits


RULES: list[dict[str, float]] = [
    {},
    {"t": 0.0},
    {"t": 0.3, "m": 0.1},
    {"k": 1},
    {"k": 7},
    {"p": 0.9},
    {"p": 1e-6},
    {"t": 2.0, "k": 50, "p": 0.7, "m": 0.01},
    {"k": 10_000, "p": 0.5},
    {"m": 1.0},
]


@pytest.mark.parametrize("vocab", [1, 2300])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ids_agree_with_the_reference(vocab: int, rule: dict[str, float]) -> None:
    logits = hard_logits(3, vocab)
    assert draw(logits, rule, "triton") == draw(logits, rule, "reference")


@pytest.mark.parametrize("rule", [{"k": 5}, {"p": 0.4}, {"k": 40, "p": 0.5}])
def test_ties_at_the_cut_are_resolved_by_id(rule: dict[str, float]) -> None:
    logits = torch.zeros(4, 60, device=DEVICE)
    assert draw(logits, rule, "triton") == draw(logits, rule, "reference")


@pytest.mark.parametrize("rule", [{"p": 0.9}, {"k": 90, "p": 0.8}, {"k": 90}])
def test_more_candidates_than_are_listed(
    rule: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_triton, "_LISTED", 16)
    logits = rand(2, 2100)
    assert draw(logits, rule, "triton") == draw(logits, rule, "reference")


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = hard_logits(5, 300)
    parameters = (
        torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0]),
        torch.tensor([0, 5, 0, 0, 10], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.9, 1.0, 0.3]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]),
        torch.tensor([0, -1, 2**63 - 1, -(2**63), 5]),
        torch.arange(5) * 1000,
    )
    there = [p.to(DEVICE) for p in parameters]
    run = select("sample", device=DEVICE, backend="triton")
    together = run(logits, *there).tolist()
    assert together == [
        int(run(logits[i : i + 1], *(p[i : i + 1] for p in there))) for i in range(5)
    ]
    assert together == select("sample", device=DEVICE, backend="reference")(logits, *there).tolist()


@pytest.mark.parametrize("rule", [{}, {"t": 0.0}, {"k": 3, "p": 0.5}])
def test_rows_that_cannot_be_sampled(rule: dict[str, float]) -> None:
    logits = rand(6, 37)
    clean = draw(logits, rule, "triton")
    logits[1, 36], logits[2, 0], logits[4], logits[5, 3] = float("nan"), INF, -INF, -INF
    ids = draw(logits, rule, "triton")
    assert [ids[i] for i in (1, 2, 4)] == [-1, -1, -1]
    assert [ids[i] for i in (0, 3)] == [clean[i] for i in (0, 3)]


def accepted(ids: list[int], drafts: list[int]) -> int:
    count = min(len(ids), 1)
    while 0 < count < len(ids) and ids[count - 1] == drafts[count]:
        count += 1
    return count


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_verify(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 1, 1, 5, 9, 80, 80, 83, 90], dtype=torch.int32)
    ids, drafts = torch.randint(0, 2, (2, 95), generator=generator)
    drafts[10:75] = ids[9:74]
    drafts[80:90] = torch.cat([drafts[80:81], ids[80:89]])
    run = select("verify", device=DEVICE, backend=backend)
    result = run(*(a.to(DEVICE) for a in (ids, drafts, starts)))
    rows = [slice(a, b) for a, b in zip(starts.tolist(), starts[1:].tolist(), strict=False)]
    assert result.tolist() == [accepted(ids[r].tolist(), drafts[r].tolist()) for r in rows]
    assert result.dtype == torch.int32
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert run(nothing, nothing, starts[:1].to(DEVICE)).tolist() == []


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("page", [(4, 8), (3, 5), (1, 1), (64, 24)])
def test_copy_pages(backend: str, dtype: torch.dtype, page: tuple[int, int]) -> None:
    source = (rand(7, *page) * 50).abs().to(dtype)
    target = torch.full((9, *page), 255.0, device=DEVICE).to(dtype)
    sources, targets = (torch.tensor(p, device=DEVICE) for p in ([1, 6, 0], [8, 0, 3]))
    select("copy_pages", device=DEVICE, dtype=dtype, backend=backend)(
        source, target, sources, targets
    )
    assert torch.equal(target[targets], source[sources])
    others = [i for i in range(9) if i not in (8, 0, 3)]
    assert (target[others].float() == torch.tensor(255.0).to(dtype).float().item()).all()


def test_wrong_arguments_are_named() -> None:
    logits, seeds = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, dtype=torch.int64)
    good = [logits, *(p.to(DEVICE) for p in (*settings(2), seeds, seeds))]
    run = select("sample", device=DEVICE, backend="triton")
    for place, name in enumerate(["logits", "temperature", "top_k", "top_p", "min_p", "seed"]):
        arguments = list(good)
        arguments[place] = good[place].double()
        with pytest.raises(ValueError, match=name):
            run(*arguments)
    copy = select("copy_pages", device=DEVICE, backend="triton")
    pages, at = torch.zeros(3, 4, device=DEVICE), torch.tensor([0], device=DEVICE)
    for name, arguments in [
        ("source", [pages, pages[:, :2], at, at]),
        ("source", [pages.t(), torch.zeros(4, 3, device=DEVICE), at, at]),
        ("sources", [pages, pages.clone(), at.int(), at]),
        ("targets", [pages, pages.clone(), at, torch.zeros(2, dtype=torch.int64, device=DEVICE)]),
    ]:
        with pytest.raises(ValueError, match=name):
            copy(*arguments)


@pytest.mark.parametrize("op", ["apply_penalties", "logprobs"])
def test_every_case(op: str) -> None:
    report = check(op, "triton", torch.float32, device=DEVICE)
    assert report.passed, str(report)


@pytest.mark.full
def test_every_case_of_sampling() -> None:
    report = check("sample", "triton", torch.float32, device=DEVICE)
    assert report.passed, str(report)
