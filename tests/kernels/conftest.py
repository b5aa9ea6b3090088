# SPDX-License-Identifier: MIT
"""Fixtures of the kernel tests: every instruction set that this machine runs, in turn."""

from collections.abc import Iterator

import pytest

from tokenspeed import _cpu


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels run in this build of them."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)
