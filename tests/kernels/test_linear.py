# SPDX-License-Identifier: MIT
"""Linear layers, one weight and one for each head, against their references."""

import pytest
import torch

from tokenspeed import _cpu
from tokenspeed.kernels import select


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str, dtype: torch.dtype) -> None:
    for size, out in ((48, 24), (300, 70), (1024, 33)):
        x = torch.randn(150, 4, size).to(dtype)
        weights = torch.randn(4, out, size).to(dtype)
        whole, one_weight = _cpu.head_linear(x, weights), _cpu.linear(x[:, 0], weights[0], None)
        for begin, end in ((0, 1), (3, 5), (16, 33), (0, 16), (0, 17), (149, 150), (20, 149)):
            assert torch.equal(_cpu.head_linear(x[begin:end], weights), whole[begin:end])
            part = _cpu.linear(x[begin:end, 0], weights[0], None)
            assert torch.equal(part, one_weight[begin:end])


@pytest.mark.parametrize(
    ("x", "weight", "name"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 4, 5), "x"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), "weight"),
        (torch.zeros(2, 3, 5), torch.zeros(3, 4, 6), "weight"),
        (torch.zeros(2, 3, 5), torch.zeros(3, 4, 5).bfloat16(), "weight"),
    ],
)
def test_wrong_shapes_are_named(x: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^head_linear: {name}\b"):
        select("head_linear", backend="cpu")(x, weight)
