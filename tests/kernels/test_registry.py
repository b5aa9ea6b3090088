# SPDX-License-Identifier: MIT
"""The registry: choice, refusal, plug-ins, and imports that need nothing compiled."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from tokenspeed.cli import kernels as cli_kernels
from tokenspeed.kernels import explain, force_backend, plugins, registry, select
from tokenspeed.kernels.norm import rms_norm
from tokenspeed.kernels.registry import Ask, Registry


def fast(x: float) -> float:
    return x


def slow(x: float) -> float:
    return -x


def plug_in(register: Callable[..., None]) -> None:
    register("double", "plugged", fast, priority=5)


def broken_plug_in(register: Callable[..., None]) -> None:
    raise RuntimeError("no such device")


@pytest.fixture
def small() -> Registry:
    made = Registry()
    made.sources.loaded = made.sources.gpu_loaded = True
    made.define("double", "(x) -> x", slow)
    return made


def ask(dtype: torch.dtype = torch.float32, **shapes: int) -> Ask:
    return Ask("double", "cpu", dtype, shapes)


def test_the_highest_priority_that_can_serve_is_taken(small: Registry) -> None:
    assert small.select(ask()) is slow
    small.register("double", "gpu", fast, devices=("cuda",), priority=9)
    small.register("double", "half", fast, dtypes=(torch.bfloat16,), priority=8)
    wide = "head_dim above 64"
    small.register(
        "double", "narrow", fast, requires=lambda a: wide if a.shapes["d"] > 64 else None
    )
    assert small.select(ask(d=64)) is fast
    assert small.select(ask(d=65)) is slow
    reasons = {v.backend: (v.chosen, v.reason) for v in small.explain(ask(d=65))}
    assert reasons == {
        "gpu": (False, "runs on cuda, not on cpu"),
        "half": (False, "takes bfloat16, not float32"),
        "narrow": (False, wide),
        "reference": (True, "serves the ask"),
    }
    assert [v.reason for v in small.explain(ask(d=1)) if v.backend == "reference"] == [
        "narrow comes first"
    ]


def test_duplicates_and_unknown_ops_are_errors(small: Registry) -> None:
    with pytest.raises(ValueError, match="defined twice"):
        small.define("double", "", slow)
    with pytest.raises(ValueError, match="registered twice"):
        small.register("double", "reference", fast)
    with pytest.raises(ValueError, match="unknown op 'triple'"):
        small.select(Ask("triple", "cpu", torch.float32, {}))


def test_plug_ins(small: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good one serves; broken ones are reported and harm nobody."""
    points = [
        EntryPoint("good", f"{__name__}:plug_in", plugins.ENTRY_POINT_GROUP),
        EntryPoint("broken", f"{__name__}:broken_plug_in", plugins.ENTRY_POINT_GROUP),
        EntryPoint("missing", "no_such_module:run", plugins.ENTRY_POINT_GROUP),
    ]
    asked: list[str] = []

    def fake_entry_points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return points

    monkeypatch.setattr(plugins, "entry_points", fake_entry_points)
    small.sources.loaded = False
    assert asked == []
    assert small.select(ask()) is fast
    assert small.select(ask(), backend="reference") is slow
    assert asked == [plugins.ENTRY_POINT_GROUP]
    assert small.problems == {
        "plug-in broken": "RuntimeError: no such device",
        "plug-in missing": "ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_forcing_a_backend() -> None:
    assert select("rms_norm", backend="reference") is rms_norm
    with force_backend("reference"):
        assert select("rms_norm") is rms_norm
        with force_backend("cpu"):
            assert select("rms_norm") is not rms_norm
    assert select("rms_norm") is not rms_norm
    with force_backend("cpu"), pytest.raises(ValueError, match="reference: cpu is forced"):
        select("rms_norm", dtype=torch.float64)


def test_the_built_in_choice() -> None:
    chosen = {v.backend: v.chosen for v in explain("attention_mla", dtype=torch.bfloat16)}
    assert chosen == {"cpu": True, "reference": False}
    assert select("rms_norm", dtype=torch.float64) is rms_norm
    assert select("rms_norm", device="meta") is rms_norm
    assert registry.REGISTRY.problems == {}


def run_python(code: str) -> str:
    done: Any = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return str(done.stdout).strip()


def test_importing_needs_neither_a_gpu_nor_the_compiled_module() -> None:
    code = """
import sys
sys.modules["tokenspeed._cpu"] = None  # as if it had not been built
import torch
torch.cuda._lazy_init = lambda: 1 / 0
from tokenspeed.kernels import select, registry
assert registry.REGISTRY.sources.loaded is False
print(select("rms_norm").__module__, *registry.REGISTRY.problems)
"""
    assert run_python(code) == "tokenspeed.kernels.norm tokenspeed.kernels.cpu"


def test_the_command_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli_kernels.add_parser(parser.add_subparsers())

    def run(*arguments: str) -> tuple[int, str]:
        args = parser.parse_args(["kernels", *arguments])
        status: int = args.run(args)
        return status, capsys.readouterr().out

    status, listing = run("list")
    assert status == 0
    assert "attention_mla    cpu, reference" in listing
    status, reasons = run("explain", "linear", "--dtype", "float64", "--shape", "in=64")
    assert status == 0
    assert "takes float32, bfloat16, not float64" in reasons
    assert "* reference" in reasons
    assert run("explain", "no_such_op")[0] == 2
    assert run("explain", "linear", "--device", "toaster")[0] == 2
    with pytest.raises(SystemExit):
        run("explain", "linear", "--shape", "in")
