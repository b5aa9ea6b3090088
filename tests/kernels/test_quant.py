# SPDX-License-Identifier: MIT
"""Quantised formats, and products with packed weights on every instruction set."""

import pytest
import torch
from torch import Tensor

from tokenspeed import _cpu
from tokenspeed.kernels import select
from tokenspeed.kernels.quant import FORMATS, QuantFormat, QuantWeight, dequantize, quantize

# Relative error of normally distributed weights: what a format can hold, and no worse.
ERRORS = {"int8": 0.008, "int4": 0.10, "fp8": 0.03, "mxfp4": 0.15, "nvfp4": 0.12}
SIZES = [(1, 32, 1), (1, 1024, 64), (2, 128, 130), (7, 256, 70), (13, 96, 64), (200, 160, 96)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("form", FORMATS)
def test_values_survive(form: QuantFormat) -> None:
    for shape in ((64, 128), (200, 384), (3, 40, 256)):
        weight = normal(*shape) * 0.05
        held = quantize(weight, form)
        assert held.shape == shape
        assert off(dequantize(held), weight) < ERRORS[form]
        assert torch.equal(dequantize(quantize(torch.zeros(shape), form)), torch.zeros(shape))


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_what_a_format_holds_comes_back(form: QuantFormat) -> None:
    """Values that are exact in the format stay: its scales are those of their largest one."""
    once = dequantize(quantize(normal(64, 256), form))
    assert off(dequantize(quantize(once, form)), once) < 1e-6


def test_the_compiled_quantiser_is_the_reference(isa: str) -> None:
    reference = select("quantize", backend="reference")
    for bits in (8, 4):
        for group in (32, 128):
            weight = torch.cat([normal(96, 256), torch.zeros(2, 256), normal(2, 256) * 1e-20])
            codes, scales = _cpu.quantize(weight, bits, group)
            expected_codes, expected_scales = reference(weight, bits, group)
            assert torch.equal(scales, expected_scales)
            same = (codes == expected_codes).float().mean()
            assert same > 0.999  # a product may round to the other side of a half


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_products(isa: str, form: QuantFormat, dtype: torch.dtype) -> None:
    for tokens, size, out in SIZES:
        x, weight = normal(tokens, size, seed=1).to(dtype), normal(out, size, seed=2).to(dtype)
        bias = normal(out, seed=3).to(dtype)
        held = quantize(weight, form)
        packed = _cpu.pack_codes(held.codes, held.scales, 8 if form == "int8" else 4, held.group)
        found = _cpu.linear(x, packed, bias, True)
        expected = x.double() @ dequantize(held).double().T + bias.double()
        assert found.dtype == torch.float32
        size_of = x.double().norm() * dequantize(held).double().norm() * size**-0.5
        assert (found.double() - expected).norm() / size_of < 0.012  # x is held in 8 bits as well
        for row in range(tokens):
            assert torch.equal(_cpu.linear(x[row : row + 1], packed, bias, True)[0], found[row])


def test_plain_weights_of_odd_sizes(isa: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        for tokens, size, out in ((1, 1, 1), (3, 33, 65), (9, 513, 127), (25, 64, 64)):
            x = torch.full((tokens, size + 3), torch.nan).to(dtype)[:, :size]
            x.copy_(normal(tokens, size, seed=1))
            weight = normal(out, size, seed=2).to(dtype)
            found = _cpu.linear(x, _cpu.pack(weight), None, True)
            assert off(found, x.double() @ weight.double().T) < tolerance


def test_every_instruction_set_reads_the_same_panels() -> None:
    weight = normal(70, 256)
    held = quantize(weight, "int4")
    packs = [_cpu.pack(weight), _cpu.pack_codes(held.codes, held.scales, 4, 32)]
    before, isas = _cpu.isa(), _cpu.available_isas()
    try:
        for name in isas:
            _cpu.set_isa(name)
            again = [_cpu.pack(weight), _cpu.pack_codes(held.codes, held.scales, 4, 32)]
            for first, second in zip(packs, again, strict=True):
                assert torch.equal(first.data, second.data)
    finally:
        _cpu.set_isa(before)


def test_bfloat16_and_float32_multiply() -> None:
    x, weight = normal(5, 128).bfloat16(), normal(16, 128, seed=4)
    found = _cpu.linear(x, _cpu.pack(weight))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float() @ weight.T)
    narrow = _cpu.linear(weight[:, :127], _cpu.pack(x[:, :127].contiguous()))
    torch.testing.assert_close(narrow, weight[:, :127] @ x[:, :127].float().T)


def test_not_a_number_shows() -> None:
    held = quantize(normal(64, 64), "int8")
    packed = _cpu.pack_codes(held.codes, held.scales, 8, 32)
    for bad in (torch.nan, torch.inf):
        x = normal(3, 64)
        x[1, 40] = bad
        found = _cpu.linear(x, packed)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()
    weight = normal(64, 64)
    weight[7, 3] = torch.nan
    assert dequantize(quantize(weight, "int8"))[7, :32].isnan().all()
    assert dequantize(quantize(weight, "int4"))[7, :32].isnan().all()


def test_what_cannot_be_packed_is_named() -> None:
    codes, scales = torch.zeros(4, 64, dtype=torch.int8), torch.zeros(4, 2).bfloat16()
    with pytest.raises(ValueError, match="group of 48"):
        quantize(torch.zeros(4, 64), "int8", 48)
    with pytest.raises(ValueError, match="no multiple of the group of 32"):
        quantize(torch.zeros(4, 33), "int4")
    with pytest.raises(ValueError, match="scales"):
        _cpu.pack_codes(codes, scales[:, :1], 8, 32)
    with pytest.raises(ValueError, match="codes"):
        _cpu.pack_codes(codes.float(), scales, 8, 32)
    with pytest.raises(ValueError, match="bits"):
        _cpu.pack_codes(codes, scales, 5, 32)
    packed = _cpu.pack_codes(codes, scales, 8, 32)
    with pytest.raises(ValueError, match="x: expected shape"):
        _cpu.linear(torch.zeros(2, 63), packed)
    with pytest.raises(ValueError, match="weight"):
        _cpu.pack(torch.zeros(4, 0))


def test_a_layer_kernel_takes_what_its_hook_packs() -> None:
    from tokenspeed.kernels.registry import pack_of

    kernel = select("linear_quant", dtype=torch.bfloat16, group=32)
    pack = pack_of(kernel)
    assert pack is not None
    x, weight = normal(4, 128).bfloat16(), normal(96, 128).bfloat16()
    for form in FORMATS:
        held: QuantWeight = quantize(weight, form)
        expected = x.double() @ dequantize(held).double().T
        assert off(kernel(x, pack(held), None, True), expected) < 0.012
