# SPDX-License-Identifier: MIT
"""The parts of the GPU benchmark that need no GPU: floors, operands, tables, bound arguments."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_kernels  # noqa: E402
from gpu.peers import FlashInfer, VllmTriton, bind, load  # noqa: E402
from gpu.problem import make, page_table  # noqa: E402
from gpu.report import Row, ratios, table, write  # noqa: E402
from gpu.shapes import MlaShape, Roofs, decode_shapes, prefill_flops  # noqa: E402

H200 = Roofs(4.3e12, 790e12)


@pytest.mark.parametrize(
    ("shape", "floor_us"),
    [
        (MlaShape(16, 1, 1, 51200), 13.7),
        (MlaShape(16, 4, 4, 51200), 55.0),
        (MlaShape(16, 1, 8, 51200, cache="float8"), 62.6),
        (MlaShape(128, 1, 8, 51200), 144.4),  # products bind
        (MlaShape(16, 1, 8, 51200, shared=True), 18.1),  # 128 rows share one read
        (MlaShape(16, 1, 2, 51200, skewed=True), 15.5),
    ],
)
def test_floors(shape: MlaShape, floor_us: float) -> None:
    assert shape.floor_s(H200) * 1e6 == pytest.approx(floor_us, rel=0.01)


def test_prefill_products() -> None:
    assert prefill_flops(16, 8192, 0) / 790e12 * 1e6 == pytest.approx(435, rel=0.01)


def test_shapes_differ_and_the_quick_ones_are_among_them() -> None:
    every = [shape.name for shape in decode_shapes()]
    assert len(set(every)) == len(every)
    assert {shape.name for shape in decode_shapes(quick=True)} <= set(every)


@pytest.mark.parametrize("cache", ["bfloat16", "float8"])
def test_operands_give_the_reference(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setattr("gpu.problem.ROTATION_BYTES", 1)
    problem = make(MlaShape(2, 2, 3, 200, cache=cache, skewed=True), "cpu")
    truth = problem.truth()
    assert truth.shape == (6, 2, 512)
    assert torch.isfinite(truth).all()
    assert problem.kv_len.tolist() == [200, 25, 200]
    first, last = truth[:2], truth[4:]
    assert not torch.allclose(first, last)


def test_shared_requests_have_the_same_leading_pages() -> None:
    table_of, _ = page_table(MlaShape(16, 1, 3, 200, shared=True))
    assert (table_of[:, :3] == table_of[0, :3]).all()
    assert len(set(table_of[:, 3].tolist())) == 3


def test_table_and_ratios(tmp_path: Path) -> None:
    rows = [
        Row("attention_mla", "s", "gluon", cold_us=30, replay_us=20, floor_us=10, error=1e-3),
        Row("attention_mla", "s", "FlashMLA", cold_us=50, replay_us=40, floor_us=10),
        Row("attention_mla", "s", "broken", problem="RuntimeError: no"),
    ]
    lines = table(rows).splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["gluon", "FlashMLA", "broken"]
    assert " 0.50 " in lines[1]
    assert ratios(rows, "gluon", "FlashMLA") == {"attention_mla s": 2.0}
    assert ratios(rows, "gluon", "broken") == {}
    write(tmp_path / "x.json", {"device": "none"}, H200, rows)
    read = json.loads((tmp_path / "x.json").read_text())
    assert read["rows"][0]["share"] == 0.5
    assert read["roofs"]["stream_bytes_s"] == 4.3e12


def test_arguments_are_bound_by_name() -> None:
    op = torch.ops.aten.clamp.default  # clamp(Tensor self, Scalar? min=None, Scalar? max=None)
    x = torch.tensor([1.0, 5.0])
    assert op(*bind(op, {"self": x, "max": 2.0})).tolist() == [1.0, 2.0]
    with pytest.raises(TypeError, match="no value for self"):
        bind(op, {"max": 2.0})


def test_peers_that_are_not_there_are_told(tmp_path: Path) -> None:
    found, missing = load(tmp_path)
    sys.path.remove(str(tmp_path))
    assert found == []
    assert set(missing) == {"FlashMLA", "FA3", "FlashInfer", "vLLM Triton"}
    (tmp_path / "_flashmla_C.abi3.so").write_text("no library")
    found, missing = load(tmp_path)
    sys.path.remove(str(tmp_path))
    assert "_flashmla_C" in missing["FlashMLA"]


def test_peers_refuse_what_they_cannot() -> None:
    problem = make(MlaShape(2, 2, 1, 65), "cpu")
    assert VllmTriton().refusal(problem) == "one token of a request"
    assert FlashInfer().refusal(problem) is None


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = argparse.Namespace(peers=None, quick=True, only="", output=None)
    assert gpu_kernels.run(args) == 2
    said = capsys.readouterr().out
    assert "lacking: no CUDA device" in said
    assert "peer left out: FlashMLA" in said
