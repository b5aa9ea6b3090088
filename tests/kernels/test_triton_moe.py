# SPDX-License-Identifier: MIT
"""Triton's routing and experts, gated activation, addition, embedding, against the references."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import close
from tokenspeed.kernels import select
from tokenspeed.kernels.cases import check
from tokenspeed.kernels.quant import QuantFormat, quantize

ROUTES = [
    # experts, top_k, scoring, n_group, topk_group, group_score, norm, scale, biased
    (8, 2, "softmax", 1, 1, "max", True, 1.0, False),
    (61, 6, "softmax", 1, 1, "max", False, 16.0, False),
    (16, 4, "sigmoid", 4, 2, "top2", True, 2.5, True),
    (24, 3, "softmax", 3, 1, "max", False, 1.0, False),
    (256, 8, "sigmoid", 8, 4, "top2", True, 2.5, True),
    (4, 4, "sigmoid", 1, 1, "top2", True, 1.0, True),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def both(op: str, dtype: torch.dtype, *arguments: object) -> tuple[Tensor, Tensor]:
    actual, expected = (
        select(op, device=DEVICE, dtype=dtype, backend=b)(*arguments)
        for b in ("triton", "reference")
    )
    return actual, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 77), (5, 1030)])
def test_silu_mul_and_add(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = rand(shape[0], 2 * shape[1] + 3, dtype=dtype)[:, 3:]
    close(*both("silu_mul", dtype, x), dtype)
    y = rand(shape[0], 2 * shape[1], dtype=dtype, seed=2)
    assert torch.equal(*both("add", dtype, x, y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    ids = torch.tensor([3, 4, 12, 13, 5], device=DEVICE)
    assert torch.equal(*both("embedding", dtype, ids, rand(9, 70, dtype=dtype), 4))


@pytest.mark.parametrize("case", ROUTES)
def test_route(case: tuple) -> None:  # type: ignore[type-arg]
    experts, *arguments, biased = case
    logits = rand(12, experts) * 3
    logits[:6] = logits[:6].round()  # ties
    bias = rand(experts, seed=2) * 0.1 if biased else None
    (weights, ids), (expected, expected_ids) = both(
        "route", torch.float32, logits, bias, *arguments
    )
    assert torch.equal(ids, expected_ids)
    assert ids.dtype == torch.int32
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_route_survives_nan() -> None:
    run = select("route", device=DEVICE, backend="triton")
    nan = torch.full((2, 6), float("nan"), device=DEVICE)
    weights, ids = run(nan, None, 3, "sigmoid", 2, 1, "top2", True, 1.0)
    assert weights.isnan().all()
    assert ids.tolist() == [[0, 1, 2]] * 2


def routed(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k)[1].int()
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.1, -1, ids)
    return torch.rand(tokens, top_k, generator=generator).to(DEVICE), ids.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "size", "inner", "experts", "top_k"),
    [(1, 64, 32, 4, 2), (8, 96, 24, 6, 4), (3, 37, 19, 5, 5), (20, 32, 16, 2, 2),
     (150, 64, 70, 3, 2), (66, 33, 13, 20, 3)],
)  # fmt: skip
def test_moe(
    dtype: torch.dtype, tokens: int, size: int, inner: int, experts: int, top_k: int
) -> None:
    """Experts that nobody chose are NaN; some choices are computed elsewhere."""
    weights, ids = routed(tokens, experts, top_k)
    x = rand(tokens, size + 3, dtype=dtype)[:, 3:]
    w13 = rand(experts, 2 * inner, size, dtype=dtype, seed=2) * size**-0.5
    w2 = rand(experts, size, inner, dtype=dtype, seed=3) * inner**-0.5
    unused = [e for e in range(experts) if not (ids == e).any()]
    w13[unused], w2[unused] = float("nan"), float("nan")
    expected = select("moe", device=DEVICE, backend="reference")(
        *(x.float(), w13.float(), w2.float(), weights, ids)
    )
    run = select("moe", device=DEVICE, dtype=dtype, backend="triton")
    close(run(x, w13, w2, weights, ids), expected, dtype)
    addend = rand(tokens, size + 1, dtype=dtype, seed=4)[:, 1:]
    close(run(x, w13, w2, weights, ids, addend), expected + addend, dtype)


@pytest.mark.parametrize(("tokens", "least"), [(9, 1), (90, 65)])
def test_a_token_does_not_depend_on_the_others(tokens: int, least: int) -> None:
    """Within a path: up to 64 tokens, and more."""
    weights, ids = routed(tokens, 6, 2)
    x, w13, w2 = rand(tokens, 48), rand(6, 40, 48, seed=2), rand(6, 48, 20, seed=3)
    run = select("moe", device=DEVICE, backend="triton")
    whole = run(x, w13, w2, weights, ids)
    for count in (least, least + 3):
        assert torch.equal(run(x[:count], w13, w2, weights[:count], ids[:count]), whole[:count])


@pytest.mark.parametrize(
    ("form", "group", "tokens"),
    [("int8", 32, 70), ("int4", 128, 70), ("fp8", 128, 70), ("mxfp4", 32, 70), ("nvfp4", 16, 70),
     ("fp8", 128, 3), ("nvfp4", 16, 3)],
)  # fmt: skip
def test_moe_quant(form: QuantFormat, group: int, tokens: int) -> None:
    weights, ids = routed(tokens, 4, 2)
    w13 = quantize(rand(4, 256, 128, seed=2) / 11, form, group)
    w2 = quantize(rand(4, 128, 128, seed=3) / 11, form, group)
    x = rand(tokens, 128)
    close(*both("moe_quant", torch.float32, x, w13, w2, weights, ids), torch.float32)
    run = select("moe_quant", device=DEVICE, dtype=torch.bfloat16, backend="triton")
    expected = select("moe_quant", device=DEVICE, backend="reference")(x, w13, w2, weights, ids)
    close(run(x.bfloat16(), w13, w2, weights, ids), expected, torch.bfloat16)


def test_wrong_arguments_are_named() -> None:
    weights, ids = torch.ones(2, 1, device=DEVICE), torch.zeros(2, 1, dtype=torch.int32)
    good = [torch.ones(2, 4), torch.ones(3, 6, 4), torch.ones(3, 4, 3), weights, ids]
    run = select("moe", device=DEVICE, backend="triton")
    good = [tensor.to(DEVICE) for tensor in good]
    run(*good)
    for place, name, bad in [
        (0, "x", good[0][0]),
        (1, "w13", good[1][..., :2].contiguous()),
        (2, "w2", good[2][:1]),
        (3, "weights", weights[:1]),
        (4, "ids", ids.long()),
    ]:
        arguments = list(good)
        arguments[place] = bad.to(DEVICE)
        with pytest.raises(ValueError, match=f"moe: {name}"):
            run(*arguments)
    route, logits = select("route", device=DEVICE, backend="triton"), torch.zeros(1, 4).to(DEVICE)
    for name, rule in [
        ("scoring", (None, 2, "tanh", 1, 1, "max", True, 1.0)),
        ("top_k", (None, 5, "softmax", 1, 1, "max", True, 1.0)),
        ("groups", (None, 2, "softmax", 3, 1, "max", True, 1.0)),
        ("bias", (torch.ones(3), 2, "softmax", 1, 1, "max", True, 1.0)),
    ]:
        with pytest.raises(ValueError, match=name):
            route(logits, *rule)


@pytest.mark.full
@pytest.mark.parametrize("op", ["route", "moe", "moe_quant", "add"])
def test_every_case(op: str) -> None:
    report = check(op, "triton", torch.float32, device=DEVICE)
    assert report.passed, str(report)
