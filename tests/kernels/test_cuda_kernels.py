# SPDX-License-Identifier: MIT
"""CUDA sources without a GPU: compiled and judged, launched into a recorder, schedules compared."""

import ctypes
import re
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.gluon_machine import Machine, Pointer
from tests.kernels.nvcc import ROOT, compile_cubin

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
MUST_APPEAR = {"mla_combine_up": ("ACQBULK", "PREEXIT", "UCGABAR", r"LDG\.E\.128")}
SCHEDULE = """
#include "cuda/mla_schedule.h"
using namespace tokenspeed::cuda;
extern "C" void span(int cta, int total, int ctas, int* out) {
    const int parts = PartsOf(ctas, total);
    out[0] = SpanStart(cta < parts ? cta : parts, total, parts);
    out[1] = SpanStart(cta + 1 < parts ? cta + 1 : parts, total, parts);
}
extern "C" void partials(int place, int queries, int tokens, int units, int items, int total,
                         int ctas, int heads, int block, int* out) {
    const Before before{units, items};
    const Partials p =
        PartialsOf(place, queries, tokens, before, total, ctas, heads, block);
    out[0] = p.slot, out[1] = p.count, out[2] = p.line;
}
extern "C" void work(int queries, int tokens, int heads, int block, int* out) {
    const RowWork w = WorkOf(queries, tokens, heads, block);
    out[0] = w.blocks, out[1] = w.units();
}
"""


@pytest.mark.full
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_sources_compile_without_spills(source: Path, tmp_path: Path) -> None:
    kernels = compile_cubin(source, "sm_90a", tmp_path / "x.cubin")
    assert kernels
    for name, usage in kernels.items():
        assert usage.spill_bytes == usage.stack_bytes == 0, name
        assert usage.registers <= 255
        missing = [t for t in MUST_APPEAR[name] if not _appears(t, usage.sass)]
        assert missing == [], name
        assert not _appears(r"\b(LDL|STL)\b", usage.sass)


def _appears(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


@pytest.mark.full
def test_a_spill_is_seen(tmp_path: Path) -> None:
    """A kernel with a cap of registers that it cannot keep."""
    source = tmp_path / "spill.cu"
    sums = "".join(f"a[{i}] = a[{i}] * a[{(i + 7) % 64}] + x[{i}];" for i in range(64))
    source.write_text(
        '#include <cstdint>\nextern "C" __global__ void __launch_bounds__(1024, 2)\n'
        "spill(const float* x, float* y) {\n  float a[64];\n"
        f"  for (int i = 0; i < 64; ++i) a[i] = x[i + threadIdx.x];\n"
        f"  for (int r = 0; r < 100; ++r) {{ {sums} }}\n"
        "  for (int i = 0; i < 64; ++i) y[i + threadIdx.x] = a[i];\n}\n"
    )
    with pytest.raises(RuntimeError, match=r"[Ss]pill"):
        compile_cubin(source, "sm_90a", tmp_path / "x.cubin")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/mla_schedule.h as the host's compiler takes it."""
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "s.cpp").write_text(SCHEDULE)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, "-o", folder / "s.so", folder / "s.cpp"], check=True)
    return ctypes.CDLL(str(folder / "s.so"))


def call(function: Any, count: int, *arguments: int) -> list[int]:
    out = (ctypes.c_int * count)()
    function(*arguments, out)
    return list(out)


@pytest.mark.parametrize("ctas", [1, 6, 132])
@pytest.mark.parametrize(("heads", "block"), [(16, 16), (5, 32), (128, 64)])
def test_both_schedules_agree(header: ctypes.CDLL, ctas: int, heads: int, block: int) -> None:
    """The Gluon functions, run on the host, and the C++ header."""
    schedule = pytest.importorskip("tokenspeed.kernels.mla_schedule_gluon")
    combine = pytest.importorskip("tokenspeed.kernels.mla_combine_gluon")
    rows = [(1, 700), (0, 0), (2, 2), (3, 1300), (1, 64)] + [(1, 65 + i) for i in range(300)]
    q_start = torch.tensor([0] + [q for q, _ in rows]).cumsum(0).int()
    kv_len = torch.tensor([kv for _, kv in rows], dtype=torch.int32)
    work = [call(header.work, 2, q, kv, heads, block) for q, kv in rows]
    total = sum(units for _, units in work)
    tables = (Pointer(q_start), Pointer(kv_len), Pointer(kv_len))
    for cta in range(0, ctas, 17):
        machine = Machine((cta,), (ctas,), 0.0)
        found = machine.translate(schedule.locate)(tables, len(rows), 0, heads, block, 4)
        assert [int(x) for x in found[:2]] == call(header.span, 2, cta, total, ctas)
    machine = Machine((0,), (ctas,), 0.0)
    for row, head in ((0, 0), (2, heads - 1), (3, 1), (150, 0), (304, heads // 2)):
        token = int(q_start[row + 1]) - 1
        where, shared = machine.translate(combine.partials_of)(
            token, head, *tables, len(rows), ctas, 0, heads, block, 4
        )
        assert shared == (0, 0, 0)
        items, units = (sum(w[i] for w in work[:row]) for i in (0, 1))
        place = (token - int(q_start[row])) * heads + head
        expected = call(
            header.partials, 3, place, *rows[row], units, items, total, ctas, heads, block
        )
        assert [int(x) for x in where] == expected


def test_the_launch_packs_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge's launch up to the driver: grid, threads, and the bytes of its argument."""
    mla_cuda = pytest.importorskip("tokenspeed.kernels.mla_cuda")
    mla_gluon, driver = mla_cuda.mla_gluon, mla_cuda.cuda_driver
    sent: list[SimpleNamespace] = []

    def launch_kernel(config: Any, function: Any, params: int, extra: int) -> tuple[Any]:
        pointer = ctypes.c_void_p.from_address(params)
        content = ctypes.string_at(pointer.value or 0, struct.calcsize(mla_cuda.PARAMS))
        sent.append(SimpleNamespace(config=config, content=content))
        return (driver.driver.CUresult.CUDA_SUCCESS,)

    batches: list[Any] = []
    monkeypatch.setattr(mla_gluon, "launch", lambda call: None)
    partial_results = mla_gluon.partial_results

    def spied(*arguments: Any) -> tuple[Any, Tensor, Tensor]:
        batches.append(partial_results(*arguments))
        return batches[-1]

    monkeypatch.setattr(mla_gluon, "partial_results", spied)
    monkeypatch.setattr(driver.driver, "cuLaunchKernelEx", launch_kernel)
    monkeypatch.setattr(driver, "_function", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7), raising=False
    )
    tokens, heads = 3, 16
    latent = torch.randn(tokens, heads, 512).bfloat16()
    cache = torch.randn(4, 64, 576).bfloat16()
    table, slots = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    q_start, kv_len = torch.arange(4, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    w_uv = torch.randn(heads, 128, 512).bfloat16()
    arguments = (latent, latent[..., :64], cache, table, slots, q_start, kv_len, 0.1, w_uv)
    out = mla_cuda.attention_mla_up(*arguments)
    (launched,), (batch, partial, sums) = sent, batches[0]
    values = struct.unpack(mla_cuda.PARAMS, launched.content)
    pointers = [x.data_ptr() for x in (partial, sums, q_start, kv_len, w_uv, out)]
    assert list(values) == [*pointers, 3, batch.num_ctas, tokens, heads, batch.block]
    assert (launched.config.gridDimX, launched.config.gridDimY) == (4 * heads, tokens)
    assert launched.config.blockDimX == 256
    assert launched.config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    assert mla_cuda.attention_mla_up(latent[:0], latent[:0, :, :64], *arguments[2:]).shape[0] == 0
    assert len(sent) == 1


def test_a_refusing_driver_and_a_missing_cubin_are_told() -> None:
    driver = pytest.importorskip("tokenspeed.kernels.cuda_driver")
    assert "nvcc" in driver.missing("no_such_kernel", "sm_90a")
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        driver._checked((driver.driver.CUresult.CUDA_ERROR_INVALID_VALUE,))
