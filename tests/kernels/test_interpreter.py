# SPDX-License-Identifier: MIT
"""The corrected interpreter against torch, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.interpreter import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="kernels are compiled here, for a GPU")
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def _convert(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def _matmul(a, b, c, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right))


@triton.jit
def _arithmetic(x, y, sums, products, smaller, roots, total, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    left, right = tl.load(x + at), tl.load(y + at)
    tl.store(sums + at, left + right)
    tl.store(products + at, left * right)
    tl.store(smaller + at, (left < right).to(tl.int32))
    tl.store(roots + at, tl.sqrt(tl.abs(left).to(tl.float32)))
    tl.store(total, tl.sum(left.to(tl.float32), 0))


@triton.jit
def _narrow_sum(x, total, SIZE: tl.constexpr):
    tl.store(total, tl.sum(tl.load(x + tl.arange(0, SIZE)), 0))


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _convert[(1,)](x, y, x.numel())
    return y


def noise(*shape: int) -> Tensor:
    """Numbers of many sizes, among them ties between neighbours of each format."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
        -12, 9, shape, generator=generator
    )
    wide.view(-1)[:4] = torch.tensor([1.988, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 0.0])
    return wide


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2, torch.float16])
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    x = noise(4096).clamp(-440, 440)
    assert torch.equal(convert(x, dtype).float(), x.to(dtype).float())
    assert torch.equal(convert(x.to(BF16), dtype).float(), x.to(BF16).to(dtype).float())


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2])
def test_every_code_widens_to_its_number(dtype: torch.dtype) -> None:
    size = 1 << 8 * dtype.itemsize
    codes = torch.arange(size, dtype=torch.int32)
    x = codes.to(torch.uint8 if size == 256 else torch.uint16).view(dtype)
    wide = convert(x, torch.float32)
    torch.testing.assert_close(wide, x.float(), rtol=0, atol=0, equal_nan=True)


def test_float8_saturates() -> None:
    x = torch.tensor([1e9, -1e9, float("inf"), 464.5])
    assert convert(x, E4M3).float().tolist() == [448.0, -448.0, 448.0, 448.0]


@pytest.mark.parametrize("dtype", [BF16, E4M3, torch.float16, torch.float32])
def test_dot_multiplies_numbers(dtype: torch.dtype) -> None:
    # Small integers: every order of adding gives the same sum.
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randint(-8, 9, s, generator=generator).float() for s in ((16, 64), (64, 32)))
    c = torch.empty(16, 32)
    _matmul[(1,)](a.to(dtype), b.to(dtype), c, 16, 64, 32)
    assert torch.equal(c, a @ b)


def test_bfloat16_arithmetic() -> None:
    x, y = noise(256).to(BF16), noise(256).flip(0).to(BF16)
    sums, products = torch.empty_like(x), torch.empty_like(x)
    smaller, roots = torch.empty(256, dtype=torch.int32), torch.empty(256)
    total = torch.empty(1)
    _arithmetic[(1,)](x, y, sums, products, smaller, roots, total, 256)
    assert torch.equal(sums, x + y)
    assert torch.equal(products, x * y)
    assert torch.equal(smaller, (x < y).int())
    torch.testing.assert_close(roots, x.float().abs().sqrt())
    torch.testing.assert_close(total[0], x.float().sum(), rtol=1e-2, atol=1e-2)


def test_a_reduction_of_raw_bits_is_refused() -> None:
    with pytest.raises(Exception, match="widen to float32 first"):
        _narrow_sum[(1,)](noise(16).to(BF16), torch.empty(1), 16)


def test_integers_and_bfloat16() -> None:
    whole = torch.arange(-300, 300, dtype=torch.int32)[:512]
    assert torch.equal(convert(whole, BF16), whole.to(BF16))
    assert torch.equal(convert(whole.to(BF16), torch.int32), whole.to(BF16).int())
