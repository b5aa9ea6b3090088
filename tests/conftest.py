# SPDX-License-Identifier: MIT
"""Fixtures that every suite shares."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenspeed.kernels import force_backend

# Before anything imports Triton: without a GPU its kernels run on CPU tensors, in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that runs the tests."""
    return sys.executable


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain_weights() -> Iterator[None]:
    """Kernels that take weights as the checkpoint holds them: parameters stay after a load."""
    with force_backend("reference"):
        yield
