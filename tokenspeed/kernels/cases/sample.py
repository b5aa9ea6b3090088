# SPDX-License-Identifier: MIT
"""Cases of what turns logits into ids. Choices are exact but for float ties at a cut."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tokenspeed.kernels.cases.case import (
    Arguments,
    Case,
    Inputs,
    OpCases,
    Tolerance,
    Work,
    as_asked,
)
from tokenspeed.kernels.cases.ragged import INF, starts

INT64 = torch.iinfo(torch.int64)


def settings(
    rows: int, t: float = 1.0, k: int = 0, p: float = 1.0, m: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """temperature, top_k, top_p, min_p, the same for all rows."""
    whole = torch.full((rows,), k, dtype=torch.int32)
    return torch.full((rows,), t), whole, torch.full((rows,), p), torch.full((rows,), m)


def _sample(g: Inputs, rows: int, vocab: int, rule: Mapping[str, float]) -> Arguments:
    """Logits with holes and ties."""
    logits = g.normal(rows, vocab, scale=3.0)
    logits[::3, ::2] = -INF
    logits[::3, 0] = 0.5
    logits[::5] = logits[::5].round()
    seeds = g.integers(INT64.min, INT64.max, rows)
    return logits, *settings(rows, **rule), seeds, g.integers(0, 1 << 40, rows)  # type: ignore[arg-type]


def _each_its_own(g: Inputs) -> Arguments:
    logits = g.normal(9, 500, scale=2.0)
    return (
        logits,
        torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.1, 1.0]),
        torch.tensor([0, 5, 0, 0, 10, 0, 499, 0, 2], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.9, 0.5, 0.3, 1.0, 1.0, 0.9, 0.99]),
        torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.5, 0.0, 0.0, 0.0]),
        torch.tensor([0, -1, INT64.max, INT64.min, 5, 6, 7, 8, 9]),
        torch.arange(9) * 1000,
    )


def _impossible(g: Inputs) -> Arguments:
    """Rows with NaN, with +inf and of -inf alone give -1, the others what they give."""
    logits, *rest = _sample(g, 8, 70, {})
    logits[1, 69], logits[2, 0], logits[4], logits[5, 3] = float("nan"), INF, -INF, -INF
    return logits, *rest


def _all_equal(g: Inputs, rule: Mapping[str, float]) -> Arguments:
    _, *rest = _sample(g, 30, 64, rule)
    return torch.zeros(30, 64), *rest


def sample_cases() -> Iterator[Case]:
    rules: tuple[dict[str, float], ...] = (
        {},
        {"t": 0.0},
        {"t": 0.3},
        {"k": 1},
        {"k": 20},
        {"p": 0.9},
        {"p": 1e-6},
        {"m": 0.1},
        {"t": 2.0, "k": 50, "p": 0.7, "m": 0.01},
        {"k": 10_000, "p": 0.5},
        {"m": 1.0},
    )
    for vocab in (1, 5, 100, 4099):
        for rule in rules:
            rule_name = ", ".join(f"{name} {value:g}" for name, value in rule.items()) or "plain"
            yield Case(f"V={vocab} {rule_name}", _sample, (60, vocab, rule))
    yield Case("no rows", _sample, (0, 100, {}))
    yield Case("each row its own rule", _each_its_own)
    yield Case("rows that cannot be sampled", _impossible)
    for rule in rules[:2] + rules[3:5]:
        yield Case(f"all logits equal, {rule or 'plain'}", _all_equal, (rule,))


def _penalties(g: Inputs, rows: int, vocab: int) -> Arguments:
    slots = 5
    seen = g.uniform(slots, vocab) < 0.3
    count = g.integers(0, 3, slots, vocab, dtype=torch.int32)
    logits = g.inside(g.normal(rows, vocab), before=0, behind=9)
    which = torch.tensor([4, 0, 2, 2])[:rows]
    return (
        logits,
        which,
        seen,
        count,
        torch.tensor([1.0, 1.3, 0.5, 1.0])[:rows],
        torch.tensor([0.0, 0.0, 1.5, -2.0])[:rows],
        torch.tensor([0.0, 0.25, 0.0, 2.0])[:rows],
    )


def penalty_cases() -> Iterator[Case]:
    for rows in (0, 1, 4):
        for vocab in (1, 103, 4096):
            yield Case(f"B={rows} V={vocab}", _penalties, (rows, vocab))


def _changed_logits(result: object, arguments: Arguments) -> tuple[Tensor, ...]:
    return (arguments[0],)


def _logprobs(g: Inputs, rows: int, vocab: int, k: int) -> Arguments:
    logits = g.normal(rows, vocab, scale=4.0)
    logits[1::2, 1:2] = -INF
    return logits, g.integers(0, vocab, rows), k


def _chosen_is_hopeless(g: Inputs) -> Arguments:
    logits = g.normal(3, 50)
    logits[:, 7] = -INF
    return logits, torch.full((3,), 7), 5


def logprob_cases() -> Iterator[Case]:
    for rows, vocab, k in ((0, 9, 2), (1, 1, 1), (3, 100, 20), (8, 4099, 5), (2, 64, 0)):
        yield Case(f"B={rows} V={vocab} k={k}", _logprobs, (rows, vocab, k))
    yield Case("the chosen one has no chance", _chosen_is_hopeless)


def _verify(g: Inputs, lengths: tuple[int, ...]) -> Arguments:
    """Drafts that agree with what was sampled in three places of four."""
    bounds = starts(lengths)
    ids = g.integers(0, 50, int(bounds[-1]))
    agree = g.uniform(len(ids)) < 0.75
    drafts = torch.where(agree, ids.roll(1), g.integers(0, 50, len(ids)))
    return ids, drafts, bounds


def verify_cases() -> Iterator[Case]:
    for lengths in ((), (1,), (0,), (4, 4, 4), (1, 8, 0, 3, 1, 0), (1,) * 64, (300, 2)):
        yield Case(
            "rows of " + ", ".join(map(str, lengths[:6])) + f", {len(lengths)}", _verify, (lengths,)
        )


def _sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    rule = {"t": 0.0} if shapes.get("greedy") else {"t": 0.7, "k": 50, "p": 0.9}
    return _sample(g, tokens, shapes.get("vocab_size", 32768), rule)


def _penalties_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    logits, _, seen, count, *factors = _penalties(g, 4, shapes.get("vocab_size", 32768))
    rows = g.integers(0, 4, tokens)
    return logits[rows], rows, seen, count, *(f[rows] for f in factors)


def _logprobs_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _logprobs(g, tokens, shapes.get("vocab_size", 32768), 5)


def _work(arguments: Arguments) -> Work:
    logits = arguments[0]
    return Work(float(logits.numel() * logits.element_size()), 2.0 * logits.numel())


FLOAT = torch.float32
CASES = (
    OpCases(
        "sample",
        sample_cases,
        {FLOAT: Tolerance(1e-6, "ids: noise is exact, cuts may round")},
        truth=as_asked,
        share_of_mistakes=1 / 60,
        sized=_sized,
        work=_work,
        examples=({},),
    ),
    OpCases("verify", verify_cases, {FLOAT: Tolerance(1e-9, "exact")}, truth=as_asked),
    OpCases(
        "apply_penalties",
        penalty_cases,
        {FLOAT: Tolerance(1e-6, "a product and two sums")},
        read=_changed_logits,
        sized=_penalties_sized,
        work=_work,
        examples=({},),
    ),
    OpCases(
        "logprobs",
        logprob_cases,
        {FLOAT: Tolerance(2e-6, "a float32 sum of exponentials", least=1.0)},
        sized=_logprobs_sized,
        work=_work,
        examples=({},),
    ),
)
