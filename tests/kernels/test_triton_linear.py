# SPDX-License-Identifier: MIT
"""Triton's linear layers, dense and quantised, against the references."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import close
from tokenspeed.kernels import select
from tokenspeed.kernels.cases import check
from tokenspeed.kernels.quant import QuantFormat, quantize
from tokenspeed.kernels.triton_product import tile_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
BF16 = torch.bfloat16


def rand(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def both(op: str, dtype: torch.dtype, *arguments: object) -> tuple[Tensor, Tensor]:
    actual, expected = (
        select(op, device=DEVICE, dtype=dtype, backend=b)(*arguments)
        for b in ("triton", "reference")
    )
    return actual, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "size", "outputs"),
    [(1, 64, 64), (3, 1023, 5), (17, 300, 70), (70, 7, 131), (5, 2048, 24), (130, 128, 200)],
)
def test_linear(dtype: torch.dtype, tokens: int, size: int, outputs: int) -> None:
    x = rand(tokens, size + 8, dtype=dtype)[:, 8:]
    weight = rand(outputs, size, dtype=dtype, seed=2) * size**-0.5
    for bias in (None, rand(outputs, dtype=dtype, seed=3)):
        close(*both("linear", dtype, x, weight, bias), dtype)


def test_wide_results_and_wide_weights() -> None:
    x, weight = rand(4, 96, dtype=BF16), rand(40, 96, dtype=BF16, seed=2)
    actual, expected = both("linear", BF16, x, weight, None, True)
    assert actual.dtype == torch.float32
    close(actual, expected, torch.float32)
    actual, expected = both("linear", BF16, x, weight.float(), None)
    assert actual.dtype == torch.float32
    close(actual, expected, torch.float32)


@pytest.mark.parametrize("first", [0, 16, 64])
def test_a_token_does_not_depend_on_the_others(first: int) -> None:
    """Within a path: up to 16 tokens, up to 64, more."""
    x, weight = rand(first + 16, 640, dtype=BF16), rand(72, 640, dtype=BF16, seed=2)
    run = select("linear", device=DEVICE, dtype=BF16, backend="triton")
    whole = run(x, weight, None)
    for tokens in (first + 1, first + 5):
        assert torch.equal(run(x[:tokens], weight, None), whole[:tokens])


def test_depth_and_splits_depend_on_the_path_alone() -> None:
    for units in (16, 132):
        for outputs in (16, 256, 2048, 3648, 102400):
            for path in (range(1, 17), range(17, 65), (65, 128, 300, 8192)):
                tiles = [tile_for("sm_90", units, t, outputs, 2048, 2) for t in path]
                assert len({(tile.depth, tile.splits) for tile in tiles}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_linear(dtype: torch.dtype) -> None:
    x = rand(6, 3, 40, dtype=dtype).transpose(0, 1)[:, :5, :33]
    close(*both("head_linear", dtype, x, rand(5, 21, 33, dtype=dtype, seed=2)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "group"),
    [("int8", 32), ("int8", 128), ("int4", 32), ("int4", 128), ("fp8", 128), ("mxfp4", 32),
     ("nvfp4", 16)],
)  # fmt: skip
def test_linear_quant(dtype: torch.dtype, form: QuantFormat, group: int) -> None:
    odd = 384 if group == 128 else 160
    for tokens, size, outputs in ((3, odd, 70), (70, 256, 130)):
        weight = quantize(
            rand(outputs, size, dtype=torch.float32, seed=2) * size**-0.5, form, group
        )
        x = rand(tokens, size, dtype=dtype)
        bias = rand(outputs, dtype=dtype, seed=3)
        close(*both("linear_quant", dtype, x, weight, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_and_scaled_up_inputs(dtype: torch.dtype) -> None:
    weight = rand(8, 32, dtype=dtype)
    run = select("linear", device=DEVICE, dtype=dtype, backend="triton")
    assert run(rand(0, 32, dtype=dtype), weight, None).shape == (0, 8)
    x = rand(3, 32, dtype=dtype)
    x[1] = float("nan")
    y = run(x, weight, None)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("linear", (torch.ones(2, 4), torch.ones(3, 5), None), "weight"),
        ("linear", (torch.ones(2, 4), torch.ones(4, 3).t(), None), "weight"),
        ("linear", (torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)), "bias"),
        ("linear", (torch.ones(2, 4), torch.ones(3, 4).double(), None), "weight"),
        ("linear", (torch.ones(2, 4).double(), torch.ones(3, 4), None), "x"),
        ("head_linear", (torch.ones(2, 3, 4), torch.ones(2, 3, 4)), "weight"),
    ],
)
def test_wrong_arguments_are_named(op: str, arguments: tuple[object, ...], message: str) -> None:
    run = select(op, device=DEVICE, backend="triton")
    there = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        run(*there)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear", "linear_quant", "head_linear", "embedding", "silu_mul"])
def test_every_case(op: str, dtype: torch.dtype) -> None:
    report = check(op, "triton", dtype, device=DEVICE)
    assert report.passed, str(report)
