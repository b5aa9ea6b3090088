# SPDX-License-Identifier: MIT
"""Latent attention in Gluon, its source run on the CPU (`gluon_machine.py`), against the reference.

Pages and page tails that nobody owns are NaN; memory that a call allocates is NaN.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.gluon_machine import Descriptor, Machine, run
from tests.kernels.ragged import Ragged, ragged
from tokenspeed.kernels.attention import attention_mla as reference
from tokenspeed.kernels.kv_fp8 import pack_fp8, unpack_fp8
from tokenspeed.kernels.mla_shared import prefix_groups as reference_groups
from tokenspeed.kernels.mla_up import attention_mla_up as reference_up

mla_gluon = pytest.importorskip("tokenspeed.kernels.mla_gluon")
fp8 = pytest.importorskip("tokenspeed.kernels.mla_decode_fp8_gluon")

SCALE = 576**-0.5
HARD_ROWS = [(1, 1), (1, 64), (2, 65), (1, 300), (3, 129), (4, 4), (0, 0), (1, 63)]


def _launch(call: "mla_gluon.Call") -> None:
    arguments = [
        Descriptor(a.base, a.block_shape) if isinstance(a, mla_gluon.TensorDescriptor) else a
        for a in call.arguments
    ]
    run(call.kernel, call.grid, *arguments, delay_s=_delay_s, **call.constants)


_delay_s = 0.0


@pytest.fixture(autouse=True)
def _on_the_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mla_gluon, "launch", _launch)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    yield
    torch.use_deterministic_algorithms(before)


def on_units(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(mla_gluon, "num_units", lambda _: count)


def queries(batch: Ragged, heads: int) -> tuple[Tensor, Tensor]:
    """A latent query, and its part with position as a slice of something wider."""
    g = torch.Generator().manual_seed(7)
    latent = torch.randn(batch.num_tokens, heads, 512, generator=g).bfloat16()
    whole = torch.randn(batch.num_tokens, heads, 192, generator=g).bfloat16()
    return latent, whole[..., 128:]


def float8_cache(batch: Ragged) -> tuple[Tensor, Tensor]:
    """Packed rows, and what they stand for; rows that nobody owns are NaN in both."""
    cache = batch.cache(576, dtype=torch.float32, seed=3)
    free = cache[..., 0].isnan()
    cache = torch.where(free[..., None], 0.0, cache * 3.0)
    packed = pack_fp8(cache[..., :512], cache[..., 512:])
    packed[free] = 255
    return packed, unpack_fp8(packed)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-2, atol=2e-2)


FULL = pytest.mark.full


@pytest.mark.parametrize("units", [5, pytest.param(1, marks=FULL), pytest.param(40, marks=FULL)])
@pytest.mark.parametrize(
    ("heads", "page_size"), [(16, 64), (5, 128), pytest.param(40, 64, marks=FULL)]
)
def test_bfloat16_pages(
    monkeypatch: pytest.MonkeyPatch, units: int, heads: int, page_size: int
) -> None:
    on_units(monkeypatch, units)
    batch = ragged(HARD_ROWS, page_size)
    cache = batch.cache(576, dtype=torch.bfloat16, seed=3)
    latent, pe = queries(batch, heads)
    out = mla_gluon.attention_mla(latent, pe, cache, *batch.tables(), SCALE)
    close(out, reference(latent, pe, cache, *batch.tables(), SCALE))


@pytest.mark.parametrize("rows", [[(1, 700)], [(2, 90), (2, 2)]])
def test_each_block_size(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, int]]) -> None:
    on_units(monkeypatch, 7)
    batch = ragged(rows, 64)
    cache = batch.cache(576, dtype=torch.bfloat16, seed=3)
    packed, unpacked = float8_cache(batch)
    for heads in (16, 32):
        latent, pe = queries(batch, heads)
        out = mla_gluon.attention_mla(latent, pe, cache, *batch.tables(), SCALE)
        close(out, reference(latent, pe, cache, *batch.tables(), SCALE))
        out = mla_gluon.attention_mla(latent, pe, packed, *batch.tables(), SCALE)
        close(out, reference(latent.float(), pe.float(), unpacked, *batch.tables(), SCALE))


@pytest.mark.parametrize("units", [3, pytest.param(40, marks=FULL)])
def test_float8_pages(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    on_units(monkeypatch, units)
    batch = ragged(HARD_ROWS, 64)
    packed, unpacked = float8_cache(batch)
    for scale_of_queries in (1.0, 2.0**-20):  # sums near float32's smallest numbers stay exact
        latent, pe = (x * scale_of_queries for x in queries(batch, 16))
        out = mla_gluon.attention_mla(latent, pe, packed, *batch.tables(), SCALE)
        close(out, reference(latent.float(), pe.float(), unpacked, *batch.tables(), SCALE))


@pytest.mark.parametrize("units", [2, pytest.param(16, marks=FULL)])
def test_the_value_projection_is_fused(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    on_units(monkeypatch, units)
    for rows in (HARD_ROWS, [(70, 100)]):
        batch = ragged(rows, 64)
        cache = batch.cache(576, dtype=torch.bfloat16, seed=3)
        latent, pe = queries(batch, 4)
        w_uv = torch.randn(4, 64, 512, generator=torch.Generator().manual_seed(2)) / 20
        arguments = (latent, pe, cache, *batch.tables(), SCALE, w_uv.bfloat16())
        close(mla_gluon.attention_mla_up(*arguments), reference_up(*arguments))


def sharing(lengths: list[tuple[int, int, int]], page_size: int) -> Ragged:
    """Rows of (q_len, kv_len, leading pages that are those of the row before)."""
    batch = ragged([(q, kv) for q, kv, _ in lengths], page_size)
    above = None
    for slot, (_, _, common) in zip(batch.slots.tolist(), lengths, strict=True):
        if above is not None:
            batch.page_table[slot, :common] = batch.page_table[above, :common]
        above = slot
    return batch


SHARING = [
    (1, 900, 0), (1, 800, 12), (2, 850, 11), (1, 70, 1), (1, 700, 0), (1, 640, 9), (0, 0, 0),
    (1, 2000, 0), (1, 2000, 30), (1, 900, 14), (3, 900, 9),
]  # fmt: skip


@pytest.mark.parametrize("page_size", [64, 128])
def test_groups_of_shared_pages(page_size: int) -> None:
    batch = sharing(SHARING, page_size)
    expected = reference_groups(*batch.tables(), page_size)
    assert torch.equal(mla_gluon.prefix_groups(*batch.tables(), page_size), expected)
    if page_size == 64:
        rows = [[0, 3, 11]] * 3 + [[3, 4, 0]] + [[4, 6, 9]] * 2 + [[6, 7, 0]]
        rows += [[7, 9, 30]] * 2 + [[9, 11, 9]] * 2
        assert expected.tolist() == rows


@pytest.mark.parametrize("units", [9, pytest.param(1, marks=FULL), pytest.param(60, marks=FULL)])
def test_shared_pages_are_read_under_all_queries_of_a_group(
    monkeypatch: pytest.MonkeyPatch, units: int
) -> None:
    on_units(monkeypatch, units)
    batch = sharing(SHARING, 64)
    groups = reference_groups(*batch.tables(), 64)
    latent, pe = queries(batch, 6)
    cache = batch.cache(576, dtype=torch.bfloat16, seed=3)
    out = mla_gluon.attention_mla_shared(latent, pe, cache, *batch.tables(), SCALE, groups)
    close(out, reference(latent, pe, cache, *batch.tables(), SCALE))
    packed, unpacked = float8_cache(batch)
    out = mla_gluon.attention_mla_shared(latent, pe, packed, *batch.tables(), SCALE, groups)
    close(out, reference(latent.float(), pe.float(), unpacked, *batch.tables(), SCALE))


def test_a_shared_page_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests on one prefix: tiles that leave memory, counted."""
    on_units(monkeypatch, 4)
    count = [0]
    copy = Machine.copy

    def counted(*arguments: object) -> None:
        count[0] += 1
        copy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Machine, "copy", counted)
    batch = sharing([(1, 1000, 0)] + [(1, 1000, 15)] * 7, 64)
    latent, pe = queries(batch, 4)
    cache = batch.cache(576, dtype=torch.bfloat16, seed=3)
    mla_gluon.attention_mla(latent, pe, cache, *batch.tables(), SCALE)
    assert count[0] == 2 * 8 * 16
    count[0] = 0
    groups = mla_gluon.prefix_groups(*batch.tables(), 64)
    mla_gluon.attention_mla_shared(latent, pe, cache, *batch.tables(), SCALE, groups)
    assert count[0] == 2 * (15 + 8)


def test_copies_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    on_units(monkeypatch, 2)
    monkeypatch.setitem(globals(), "_delay_s", 0.004)
    batch = ragged([(1, 300), (2, 200)], 64)
    latent, pe = queries(batch, 16)
    cache = batch.cache(576, dtype=torch.bfloat16, seed=3)
    out = mla_gluon.attention_mla(latent, pe, cache, *batch.tables(), SCALE)
    close(out, reference(latent, pe, cache, *batch.tables(), SCALE))
    packed, unpacked = float8_cache(batch)
    out = mla_gluon.attention_mla(latent, pe, packed, *batch.tables(), SCALE)
    close(out, reference(latent.float(), pe.float(), unpacked, *batch.tables(), SCALE))


def test_every_finite_code_is_widened_exactly() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    assert len(codes) == 254
    padded = torch.cat([codes, codes[:2]])
    words = padded.view(torch.int32)
    first, second = Machine((0,), (1,), 0.0).translate(fp8.widened)(words)
    wide = torch.stack((first, second), -1).contiguous().view(torch.bfloat16).flatten()
    expected = padded.view(torch.float8_e4m3fn).double()
    assert torch.equal(wide.double() * 2.0**120, expected)


def test_no_tokens_and_wrong_arguments() -> None:
    batch = ragged([(1, 5)], 64)
    cache = batch.cache(576, dtype=torch.bfloat16, seed=3)
    latent, pe = queries(batch, 16)
    empty = mla_gluon.attention_mla(latent[:0], pe[:0], cache, *batch.tables(), SCALE)
    assert empty.shape == (0, 16, 512)
    table, slots, q_start, kv_len = batch.tables()
    for name, arguments in [
        ("q_latent", (latent.float(), pe, cache, table, slots, q_start, kv_len)),
        ("q_latent", (latent[..., :256], pe, cache, table, slots, q_start, kv_len)),
        ("q_pe", (latent, pe[:, :3], cache, table, slots, q_start, kv_len)),
        ("cache", (latent, pe, cache.float(), table, slots, q_start, kv_len)),
        ("cache", (latent, pe, cache[:, :60], table, slots, q_start, kv_len)),
        ("page_table", (latent, pe, cache, table.long(), slots, q_start, kv_len)),
        ("slots", (latent, pe, cache, table, slots.long(), q_start, kv_len)),
        ("q_start", (latent, pe, cache, table, slots, q_start[:1], kv_len)),
        ("kv_len", (latent, pe, cache, table, slots, q_start, kv_len.float())),
    ]:
        with pytest.raises(ValueError, match=f"attention_mla: {name}"):
            mla_gluon.attention_mla(*arguments, SCALE)
