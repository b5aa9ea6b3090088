# SPDX-License-Identifier: MIT
"""Routing and experts against the references."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import close
from tokenspeed import _cpu
from tokenspeed.kernels import select
from tokenspeed.kernels.cases.check import check
from tokenspeed.kernels.moe import moe as reference_moe
from tokenspeed.kernels.moe import moe_quant as reference_moe_quant
from tokenspeed.kernels.quant import QuantFormat, quantize
from tokenspeed.kernels.registry import pack_of


def test_route_takes_the_lower_id_at_a_tie_and_survives_nan(isa: str) -> None:
    run = select("route", backend="cpu")
    _, ids = run(torch.zeros(1, 6), None, 3, "softmax", 1, 1, "max", True, 1.0)
    assert ids.tolist() == [[0, 1, 2]]
    weights, ids = run(
        torch.full((2, 6), float("nan")), None, 3, "sigmoid", 2, 1, "top2", True, 1.0
    )
    assert weights.isnan().all()
    assert ((ids >= 0) & (ids < 6)).all()


def experts(
    tokens: int, size: int, inner: int, count: int, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """x, w13, w2, weights, ids; experts that nobody chose are NaN."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, size, generator=generator).to(dtype)
    w13 = (torch.randn(count, 2 * inner, size, generator=generator) * size**-0.5).to(dtype)
    w2 = (torch.randn(count, size, inner, generator=generator) * inner**-0.5).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    ids = torch.rand(tokens, count, generator=generator).topk(top_k)[1].int()
    unused = [e for e in range(count) if not (ids == e).any()]
    w13[unused], w2[unused] = float("nan"), float("nan")
    return x, w13, w2, weights, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_cases(isa: str, dtype: torch.dtype) -> None:
    report = check("moe", "cpu", dtype)
    assert report.passed, str(report)


SHAPES = [
    # tokens, size, inner, experts, top_k
    (1, 64, 32, 4, 2),
    (8, 128, 96, 16, 4),
    (3, 37, 19, 5, 5),
    (150, 64, 70, 3, 2),
    (450, 33, 130, 2, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_does_not_depend_on_the_tokens_beside_it(
    isa: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    x, w13, w2, weights, ids = experts(*shape, dtype)
    packed = _cpu.pack(w13), _cpu.pack(w2)
    whole = _cpu.moe(x, *packed, weights, ids, x)
    close(whole, reference_moe(x, w13, w2, weights, ids, x), dtype)
    for begin, end in [(i, i + 1) for i in range(0, len(x), 7)] + [(1, 3), (len(x) // 2, len(x))]:
        at = slice(begin, end)
        assert torch.equal(_cpu.moe(x[at], *packed, weights[at], ids[at], x[at]), whole[at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "group"), [("int8", 32), ("int8", 64), ("int4", 32)])
def test_quantised_experts(isa: str, dtype: torch.dtype, form: QuantFormat, group: int) -> None:
    """Activations become int8 as well: their error is that of 127 steps of a group's largest."""
    moe = select("moe_quant", backend="cpu", dtype=dtype, group=group)
    for tokens, size, inner in ((1, 128, 64), (70, 192, 320)):
        x, *plain, weights, ids = experts(tokens, size, inner, 6, 2, dtype)
        ids = ids.clone()
        ids[-1] = torch.tensor([-1, 2])
        held = [quantize(torch.nan_to_num(weight), form, group) for weight in plain]
        packed = [pack_of(moe)(weight) for weight in held]  # type: ignore[misc]
        found = moe(x, *packed, weights, ids, x)
        expected = reference_moe_quant(x, held[0], held[1], weights, ids, x)
        assert (found - expected).float().norm() < 0.02 * expected.float().norm()
        for at in (slice(0, 1), slice(tokens // 2, tokens)):
            assert torch.equal(moe(x[at], *packed, weights[at], ids[at], x[at]), found[at])


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_weights_of_another_dtype(isa: str, rows: torch.dtype) -> None:
    held = torch.bfloat16 if rows == torch.float32 else torch.float32
    x, w13, w2, weights, ids = experts(9, 37, 19, 5, 3, rows)
    w13, w2 = torch.nan_to_num(w13).to(held), torch.nan_to_num(w2).to(held)
    out = _cpu.moe(x, _cpu.pack(w13), _cpu.pack(w2), weights, ids)
    assert out.dtype == rows
    expected = reference_moe(x.float(), w13.float(), w2.float(), weights, ids)
    close(out, expected, rows)


def test_tokens_in_several_passes() -> None:
    """More pairs than are held at once."""
    x, w13, w2, weights, ids = experts(4200, 8, 8, 5, 4, torch.float32)
    out = _cpu.moe(x, _cpu.pack(w13), _cpu.pack(w2), weights, ids, x)
    close(out, reference_moe(x, w13, w2, weights, ids, x), torch.float32)


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_ids_below_zero_are_computed_elsewhere(tokens: int) -> None:
    x, w13, w2, weights, ids = experts(tokens, 8, 6, 4, 3, torch.float32)
    w13, w2 = torch.nan_to_num(w13), torch.nan_to_num(w2)
    ranks = [torch.where((ids >= e) & (ids < e + 2), ids - e, -1) for e in (0, 2)]
    for backend in ("reference", "cpu"):
        moe = select("moe", backend=backend)
        pack = pack_of(moe) or torch.clone
        halves = [
            moe(x, pack(w13[e : e + 2].contiguous()), pack(w2[e : e + 2].contiguous()), weights, at)
            for e, at in zip((0, 2), ranks, strict=True)
        ]
        close(halves[0] + halves[1], moe(x, pack(w13), pack(w2), weights, ids), torch.float32)


def test_a_recorded_call_takes_the_ids_of_its_replay() -> None:
    x, w13, w2, weights, ids = experts(9, 64, 32, 4, 2, torch.bfloat16)
    packed = _cpu.pack(torch.nan_to_num(w13)), _cpu.pack(torch.nan_to_num(w2))
    recording = _cpu.Recording(_cpu.Arena(), len(x), len(x), len(x))
    with recording:
        out = _cpu.moe(x, *packed, weights, ids, x)
    ids.copy_(ids.flip(0)), weights.copy_(weights.flip(0)), x.copy_(x.flip(0))
    expected = _cpu.moe(x, *packed, weights, ids, x)
    assert not torch.equal(out, expected)
    recording.replay(len(x), len(x))
    assert torch.equal(out, expected)
    ids[0, 0] = 4
    with pytest.raises(ValueError, match="ids"):
        recording.replay(len(x), len(x))


def test_what_does_not_fit_is_refused() -> None:
    x, w13, w2 = torch.ones(1, 4), torch.ones(2, 6, 4), torch.ones(2, 4, 3)
    weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    up, down = _cpu.pack(w13), _cpu.pack(w2)
    _cpu.moe(x, up, down, weights, ids)
    with pytest.raises(ValueError, match="ids"):
        _cpu.moe(x, up, down, weights, torch.full_like(ids, 2))
    with pytest.raises(ValueError, match="w2"):
        _cpu.moe(x, up, _cpu.pack(w2[:1]), weights, ids)
    with pytest.raises(ValueError, match="w13"):
        _cpu.moe(x, _cpu.pack(w13[..., :2].contiguous()), down, weights, ids)
    with pytest.raises(ValueError, match="addend"):
        _cpu.moe(x, up, down, weights, ids, torch.ones(1, 3))
    logits = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="scoring"):
        _cpu.route(logits, None, 2, "tanh", 1, 1, "max", True, 1.0)
    with pytest.raises(ValueError, match="top_k"):
        _cpu.route(logits, None, 5, "softmax", 1, 1, "max", True, 1.0)
    with pytest.raises(ValueError, match="topk_group"):
        _cpu.route(logits, None, 3, "softmax", 2, 1, "max", True, 1.0)
