# SPDX-License-Identifier: MIT
"""Attention over keys in line in Gluon, its source run on the CPU, against the reference."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.gluon_machine import Descriptor, run
from tokenspeed.kernels.attention import attention_ragged as reference

ragged_gluon = pytest.importorskip("tokenspeed.kernels.ragged_gluon")
SCALE = 192**-0.5


def _launch(call: "ragged_gluon.Call") -> None:
    arguments = [
        Descriptor(a.base, a.block_shape) if isinstance(a, ragged_gluon.TensorDescriptor) else a
        for a in call.arguments
    ]
    run(call.kernel, call.grid, *arguments, delay_s=0.0, **call.constants)


@pytest.fixture(autouse=True)
def _on_the_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ragged_gluon.mla_gluon, "launch", _launch)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    yield
    torch.use_deterministic_algorithms(before)


def operands(rows: list[tuple[int, int]], heads: int) -> tuple[torch.Tensor, ...]:
    """(q, k, v, q_start, k_start, q_tail, k_tail) as slices of fused projections."""
    g = torch.Generator().manual_seed(3)
    num_queries, num_keys = (sum(column) for column in zip(*rows, strict=True))
    q = torch.randn(num_queries, heads, 192, generator=g).bfloat16()
    kv = torch.randn(num_keys, heads, 256, generator=g).bfloat16()
    latent = torch.randn(num_keys, 576, generator=g).bfloat16()
    q_start = torch.tensor([0] + [n for n, _ in rows]).cumsum(0).int()
    k_start = torch.tensor([0] + [m for _, m in rows]).cumsum(0).int()
    parts = q[..., :128], kv[..., :128], kv[..., 128:]
    return *parts, q_start, k_start, q[..., 128:], latent[:, 512:]


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "rows", [[(130, 400)], [(3, 70), (0, 0), (200, 200), (1, 64), (5, 3), (2, 0)]]
)
def test_it_matches_the_reference(rows: list[tuple[int, int]], causal: bool) -> None:
    q, k, v, q_start, k_start, q_tail, k_tail = operands(rows, 2)
    arguments = (q, k, v, q_start, k_start, SCALE, causal, q_tail, k_tail)
    out, lse = ragged_gluon.attention_ragged(*arguments)
    expected, expected_lse = reference(*arguments)
    torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def test_a_nan_of_another_request_stays_there() -> None:
    q, k, v, q_start, k_start, q_tail, k_tail = operands([(4, 70), (4, 90)], 2)
    clean, _ = ragged_gluon.attention_ragged(q, k, v, q_start, k_start, SCALE, True, q_tail, k_tail)
    v[70:] = float("nan")
    spoilt, _ = ragged_gluon.attention_ragged(
        q, k, v, q_start, k_start, SCALE, True, q_tail, k_tail
    )
    assert torch.equal(spoilt[:4], clean[:4])
    assert spoilt[4:].isnan().all()


def test_no_tokens_and_wrong_arguments() -> None:
    q, k, v, q_start, k_start, q_tail, k_tail = operands([(4, 70)], 2)
    run_it = ragged_gluon.attention_ragged
    none = torch.zeros(2, dtype=torch.int32)
    assert run_it(q[:0], k, v, none, k_start, SCALE, True, q_tail[:0], k_tail)[0].shape[0] == 0
    out, lse = run_it(q, k[:0], v[:0], q_start, none, SCALE, True, q_tail, k_tail[:0])
    assert (out == 0).all()
    assert (lse == -float("inf")).all()
    with pytest.raises(ValueError, match="q_tail and k_tail"):
        run_it(q, k, v, q_start, k_start, SCALE)
    for name, arguments in [
        ("q", (q.float(), k, v)),
        ("k", (q, k[..., :64], v)),
        ("v", (q, k, v.repeat_interleave(2, -1)[..., ::2])),
        ("heads", (q, k[:, :1], v)),
    ]:
        with pytest.raises(ValueError, match=name):
            run_it(*arguments, q_start, k_start, SCALE, True, q_tail, k_tail)
