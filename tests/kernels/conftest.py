# SPDX-License-Identifier: MIT
"""Fixtures of the kernel tests: every instruction set that this machine runs, in turn."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import interpreter
from tokenspeed import _cpu

if interpreter.interpreting():
    interpreter.install()


@pytest.fixture(scope="package", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """References are small: torch's threads would spin for longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels run in this build of them."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)
