# SPDX-License-Identifier: MIT
"""Routing and experts against the references."""

import pytest
import torch

from tests.kernels.ragged import close
from tokenspeed import _cpu
from tokenspeed.kernels import select

ROUTES = [
    # experts, top_k, scoring, n_group, topk_group, group_score, norm, scale, biased
    (8, 2, "softmax", 1, 1, "max", True, 1.0, False),
    (61, 6, "softmax", 1, 1, "max", False, 16.0, False),
    (16, 4, "sigmoid", 4, 2, "top2", True, 2.5, True),
    (24, 3, "softmax", 3, 1, "max", False, 1.0, False),
    (256, 8, "sigmoid", 8, 4, "top2", True, 2.5, True),
    (4, 4, "sigmoid", 1, 1, "top2", True, 1.0, True),
]


@pytest.mark.parametrize("case", ROUTES)
def test_route(isa: str, case: tuple) -> None:  # type: ignore[type-arg]
    experts, *arguments, biased = case
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, experts, generator=generator) * 3
    bias = torch.randn(experts, generator=generator) * 0.1 if biased else None
    weights, ids = select("route", backend="cpu")(logits, bias, *arguments)
    expected, expected_ids = select("route", backend="reference")(logits, bias, *arguments)
    assert torch.equal(ids, expected_ids)
    assert ids.dtype == torch.int32
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_route_takes_the_lower_id_at_a_tie_and_survives_nan(isa: str) -> None:
    run = select("route", backend="cpu")
    _, ids = run(torch.zeros(1, 6), None, 3, "softmax", 1, 1, "max", True, 1.0)
    assert ids.tolist() == [[0, 1, 2]]
    weights, ids = run(
        torch.full((2, 6), float("nan")), None, 3, "sigmoid", 2, 1, "top2", True, 1.0
    )
    assert weights.isnan().all()
    assert ((ids >= 0) & (ids < 6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "size", "inner", "experts", "top_k"),
    [(1, 64, 32, 4, 2), (8, 128, 96, 16, 4), (3, 37, 19, 5, 5), (150, 64, 70, 3, 2),
     (300, 33, 130, 2, 1)],
)  # fmt: skip
def test_moe(
    isa: str, dtype: torch.dtype, tokens: int, size: int, inner: int, experts: int, top_k: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, size, generator=generator).to(dtype)
    w13 = (torch.randn(experts, 2 * inner, size, generator=generator) * size**-0.5).to(dtype)
    w2 = (torch.randn(experts, size, inner, generator=generator) * inner**-0.5).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k)[1].int()
    unused = [e for e in range(experts) if not (ids == e).any()]
    w13[unused], w2[unused] = float("nan"), float("nan")
    expected = select("moe", dtype=dtype, backend="reference")(x, w13, w2, weights, ids)
    whole = _cpu.moe(x, w13, w2, weights, ids)
    close(whole, expected, dtype)
    for row in range(tokens):
        at = slice(row, row + 1)
        assert torch.equal(_cpu.moe(x[at], w13, w2, weights[at], ids[at])[0], whole[row])


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_ids_below_zero_are_computed_elsewhere(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weights = torch.randn(tokens, 8, generator=generator), torch.rand(tokens, 3)
    w13, w2 = torch.randn(4, 12, 8, generator=generator), torch.randn(4, 8, 6, generator=generator)
    ids = torch.rand(tokens, 4, generator=generator).topk(3)[1].int()
    ranks = [torch.where((ids >= e) & (ids < e + 2), ids - e, -1) for e in (0, 2)]
    for backend in ("reference", "cpu"):
        moe = select("moe", backend=backend)
        halves = [
            moe(x, w13[e : e + 2].contiguous(), w2[e : e + 2].contiguous(), weights, local)
            for e, local in zip((0, 2), ranks, strict=True)
        ]
        close(halves[0] + halves[1], moe(x, w13, w2, weights, ids), torch.float32)


def test_experts_outside_the_range_are_refused() -> None:
    x, w13, w2 = torch.ones(1, 4), torch.ones(2, 6, 4), torch.ones(2, 4, 3)
    weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    _cpu.moe(x, w13, w2, weights, ids)
    with pytest.raises(ValueError, match="ids"):
        _cpu.moe(x, w13, w2, weights, torch.full_like(ids, 2))
    with pytest.raises(ValueError, match="w2"):
        _cpu.moe(x, w13, w2[:1], weights, ids)
    with pytest.raises(ValueError, match="w13"):
        _cpu.moe(x, w13[..., :2], w2, weights, ids)
    logits = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="scoring"):
        _cpu.route(logits, None, 2, "tanh", 1, 1, "max", True, 1.0)
    with pytest.raises(ValueError, match="top_k"):
        _cpu.route(logits, None, 5, "softmax", 1, 1, "max", True, 1.0)
    with pytest.raises(ValueError, match="topk_group"):
        _cpu.route(logits, None, 3, "softmax", 2, 1, "max", True, 1.0)
