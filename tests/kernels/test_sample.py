# SPDX-License-Identifier: MIT
"""Sampling: agreement with the reference, the distribution, and independence of the batch."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels import select
from tokenspeed.kernels.sample import gumbel_noise

INF = float("inf")


def parameters(
    rows: int, *, t: float = 1.0, k: int = 0, p: float = 1.0, m: float = 0.0
) -> tuple[Tensor, ...]:
    return (
        torch.full((rows,), t),
        torch.full((rows,), k, dtype=torch.int32),
        torch.full((rows,), p),
        torch.full((rows,), m),
    )


def draw(backend: str, logits: Tensor, settings: tuple[Tensor, ...], seed: int = 7) -> Tensor:
    rows = logits.shape[0]
    seeds = torch.full((rows,), seed, dtype=torch.int64)
    run = select("sample", backend=backend)
    ids: Tensor = run(logits, *settings, seeds, torch.arange(rows))
    return ids


@cache
def agreement_case(vocab: int, settings: tuple[tuple[str, float], ...]) -> tuple[Tensor, Tensor]:
    """Logits with holes and ties, and the reference's ids: once for all instruction sets."""
    logits = torch.randn(200, vocab, generator=torch.Generator().manual_seed(1)) * 3
    logits[::3, ::2] = -INF
    logits[::3, 0] = 0.5
    logits[::5] = logits[::5].round()
    return logits, draw("reference", logits, parameters(200, **dict(settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab", [1, 5, 100, 4099])
@pytest.mark.parametrize(
    "settings",
    [{}, {"t": 0.0}, {"t": 0.3}, {"k": 1}, {"k": 20}, {"p": 0.9}, {"p": 1e-6}, {"m": 0.1},
     {"t": 2.0, "k": 50, "p": 0.7, "m": 0.01}, {"k": 10_000, "p": 0.5}, {"m": 1.0}],
)  # fmt: skip
def test_ids_agree_with_the_reference(isa: str, vocab: int, settings: dict[str, float]) -> None:
    logits, expected = agreement_case(vocab, tuple(settings.items()))
    ids = draw("cpu", logits, parameters(200, **settings))  # type: ignore[arg-type]
    assert int((ids != expected).sum()) <= 1  # a float tie at a cut
    assert ((ids >= 0) & (ids < vocab)).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("settings", [{}, {"t": 0.7}, {"k": 5}, {"p": 0.8}, {"m": 0.2}])
def test_the_distribution(backend: str, settings: dict[str, float]) -> None:
    """Chi-square against the exact probabilities; the bound is the 1e-6 quantile or above."""
    draws, vocab = 20_000, 12
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    ids = draw(backend, row.repeat(draws, 1), parameters(draws, **settings))  # type: ignore[arg-type]
    expected = exact(row, **settings) * draws
    observed = ids.bincount(minlength=vocab).double()
    possible = expected > 0
    assert int(observed[~possible].sum()) == 0
    chi_square = ((observed - expected) ** 2 / expected)[possible].sum()
    assert chi_square < 55.0  # 11 degrees of freedom: P(above) is 7e-8


def exact(row: Tensor, t: float = 1.0, k: int = 0, p: float = 1.0, m: float = 0.0) -> Tensor:
    values, order = (row.double() / t).sort(descending=True)
    probability = values.softmax(0)
    keep = torch.arange(len(row)) < (k or len(row))
    keep &= probability >= m * probability[0]
    probability = probability * keep / (probability * keep).sum()
    keep &= (probability.cumsum(0) - probability) < p
    probability = probability * keep / (probability * keep).sum()
    return torch.zeros_like(probability).scatter(0, order, probability)


def test_noise_is_gumbel() -> None:
    """Mean and variance of 2 million values; neighbours in every direction are uncorrelated."""
    noise = gumbel_noise(torch.arange(40), torch.arange(40) * 3, 50_000).double()
    assert abs(float(noise.mean()) - 0.5772157) < 0.004
    assert abs(float(noise.var()) - 1.6449341) < 0.012
    centred = noise - noise.mean()
    for a, b in [(centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])]:
        assert abs(float((a * b).mean())) < 0.006
    assert noise.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_does_not_depend_on_the_batch(backend: str) -> None:
    logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(2))
    settings = [
        torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.1, 1.0]),
        torch.tensor([0, 5, 0, 0, 10, 0, 499, 0, 2], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.9, 0.5, 0.3, 1.0, 1.0, 0.9, 0.99]),
        torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.5, 0.0, 0.0, 0.0]),
        torch.tensor([0, -1, 2**63 - 1, -(2**63), 5, 6, 7, 8, 9]),
        torch.arange(9) * 1000,
    ]
    run = select("sample", backend=backend)
    together = run(logits, *settings)
    alone = [int(run(logits[i : i + 1], *(s[i : i + 1] for s in settings))) for i in range(9)]
    assert together.tolist() == alone
    shuffled = torch.randperm(9)
    assert torch.equal(run(logits[shuffled], *(s[shuffled] for s in settings)), together[shuffled])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("settings", [{}, {"t": 0.0}, {"k": 3, "p": 0.5}])
def test_rows_that_cannot_be_sampled(backend: str, settings: dict[str, float]) -> None:
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(2))
    clean = draw(backend, logits, parameters(6, **settings))  # type: ignore[arg-type]
    logits[1, 36], logits[2, 0], logits[4], logits[5, 3] = float("nan"), INF, -INF, -INF
    ids = draw(backend, logits, parameters(6, **settings))  # type: ignore[arg-type]
    assert ids[[1, 2, 4]].tolist() == [-1, -1, -1]
    assert torch.equal(ids[[0, 3]], clean[[0, 3]])


def test_greedy_takes_the_lowest_id_and_tiny_temperatures_are_greedy(isa: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0] + [0.0] * 40])
    for temperature in (0.0, 1e-30, 9e-6):
        assert draw("cpu", logits, parameters(1, t=temperature)).tolist() == [1]


def test_penalties(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab, slots = 103, 5
    wide = torch.randn(4, vocab + 9, generator=generator)
    seen = torch.rand(slots, vocab, generator=generator) < 0.3
    count = torch.randint(0, 3, (slots, vocab), generator=generator, dtype=torch.int32)
    settings = (
        torch.tensor([1.0, 1.3, 0.5, 1.0]),
        torch.tensor([0.0, 0.0, 1.5, -2.0]),
        torch.tensor([0.0, 0.25, 0.0, 2.0]),
    )
    results = []
    for backend in ("cpu", "reference"):
        logits = wide.clone()[:, :vocab]
        rows = torch.tensor([4, 0, 2, 2])
        select("apply_penalties", backend=backend)(logits, rows, seen, count, *settings)
        results.append(logits)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], wide[0, :vocab])


def test_logprobs() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, -INF, 0.0, 1.0]])
    chosen, rank, top_ids, top = select("logprobs")(logits, torch.tensor([2, 0]), 2)
    exact_values = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, exact_values[[0, 1], [2, 0]])
    assert rank.tolist() == [3, 1]
    assert sorted(top_ids[0].tolist()) == [1, 3]
    assert top_ids[1].tolist() == [0, 3]
    torch.testing.assert_close(top[1], exact_values[1, [0, 3]])


def test_wrong_arguments_are_named() -> None:
    run = select("sample", backend="cpu")
    logits, seeds = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    good = [logits, *parameters(2), seeds, seeds]
    run(*good)
    for place, name in enumerate(["logits", "temperature", "top_k", "top_p", "min_p", "seed"]):
        for bad in (good[place].double(), good[place][..., :1]):
            arguments = list(good)
            arguments[place] = bad
            if name == "logits" and bad.dtype == torch.float32:
                continue  # fewer tokens are fewer tokens
            with pytest.raises(ValueError, match=name):
                run(*arguments)
