# SPDX-License-Identifier: MIT
"""The registry: choice, refusal, plug-ins, and imports that need nothing compiled."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenspeed.cli.main import main
from tokenspeed.kernels import explain, force_backend, plugins, registry, select
from tokenspeed.kernels.norm import rms_norm
from tokenspeed.kernels.registry import Ask, Registry
from tokenspeed.kernels.table_files import FORMAT, SHIPPED, TableFile, Tables


def fast(x: float) -> float:
    return x


def slow(x: float) -> float:
    return -x


def reference_of(kernel: Any) -> Any:
    """The function behind the reference's check of arguments; None: it is another kernel."""
    return getattr(kernel, "__wrapped__", None)


def plug_in(register: Callable[..., None]) -> None:
    register("double", "plugged", fast, priority=5)


def broken_plug_in(register: Callable[..., None]) -> None:
    raise RuntimeError("no such device")


@pytest.fixture
def small() -> Registry:
    made = Registry(tables=Tables(()))
    made.sources.loaded = made.sources.gpu_loaded = True
    made.define("double", "(x) -> x", slow)
    return made


def ask(dtype: torch.dtype = torch.float32, **shapes: int) -> Ask:
    return Ask("double", "cpu", dtype, shapes)


def test_the_highest_priority_that_can_serve_is_taken(small: Registry) -> None:
    assert reference_of(small.select(ask())) is slow
    small.register("double", "gpu", fast, devices=("cuda",), priority=9)
    small.register("double", "half", fast, dtypes=(torch.bfloat16,), priority=8)
    wide = "head_dim above 64"
    small.register(
        "double", "narrow", fast, requires=lambda a: wide if a.shapes["d"] > 64 else None
    )
    assert small.select(ask(d=64)) is fast
    assert reference_of(small.select(ask(d=65))) is slow
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
    assert reference_of(small.select(ask(), backend="reference")) is slow
    assert asked == [plugins.ENTRY_POINT_GROUP]
    assert small.problems == {
        "plug-in broken": "RuntimeError: no such device",
        "plug-in missing": "ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_forcing_a_backend() -> None:
    assert reference_of(select("rms_norm", backend="reference")) is rms_norm
    with force_backend("reference"):
        assert reference_of(select("rms_norm")) is rms_norm
        with force_backend("cpu"):
            assert reference_of(select("rms_norm")) is None
    assert reference_of(select("rms_norm")) is None
    with force_backend("cpu"), pytest.raises(ValueError, match="reference: cpu is forced"):
        select("rms_norm", dtype=torch.float64)


def test_the_built_in_choice() -> None:
    chosen = {v.backend for v in explain("attention_mla", dtype=torch.bfloat16) if v.chosen}
    assert chosen == {"cpu"}
    assert reference_of(select("rms_norm", dtype=torch.float64)) is rms_norm
    assert reference_of(select("rms_norm", device="meta")) is rms_norm
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


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(status, what `tokenspeed kernels ...` prints)."""
    status = main(["kernels", *arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_the_command_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    status, listing = run_command(capsys, "list")
    assert status == 0
    assert "apply_penalties  cpu, reference" in listing
    status, reasons = run_command(
        capsys, "explain", "linear", "--dtype", "float64", "--shape", "in=64"
    )
    assert status == 0
    assert "takes float32, bfloat16, not float64" in reasons
    assert "* reference" in reasons


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("explain no_such_op", "unknown op 'no_such_op'"),
        ("explain linear --device toaster", "unknown device 'toaster'"),
        ("explain", "give an op, or --model"),
        ("explain linear --model deepseek-v3", "give an op, or --model"),
        ("explain --model deepseek-v3 --dtype float32", "a model has its own"),
        ("explain --model deepseek-v3 --layer 61", "layers 0 to 60"),
        ("explain --model no-such-model", "none of the shipped shapes"),
        ("verify --op no_such_op", "unknown op"),
        ("verify --backend nobody", "no backend 'nobody'"),
        ("bench --tokens 0", "--tokens must be at least 1"),
        ("bench --seconds 0", "--seconds must be above 0"),
        ("tune --device cuda", "no cuda device is present"),
    ],
)
def test_wrong_commands_are_refused(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        says = "unrecognized"  # there is one: another command is wrong
        arguments += " --nonsense"
    try:
        status, text = run_command(capsys, *arguments.split())
    except SystemExit as stop:
        status, text = int(str(stop.code)), capsys.readouterr().err
    assert status in (1, 2)
    assert says in text


@pytest.mark.parametrize("arch", ["cpu", "sm_90", "gfx950"])
def test_a_layer_of_deepseek_v3_is_explained(arch: str) -> None:
    """In a process of its own: here Triton's kernels may be those of its interpreter."""
    command = ["-m", "tokenspeed", "kernels", "explain", "--model", "deepseek-v3", "--layer"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--arch", arch, "--tp", "8"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    status, text = done.returncode, done.stdout
    assert status == 0
    assert "layers 0 to 2\n" in text
    assert "layers 3 to 60\n" in text
    place = "cpu" if arch == "cpu" else f"cuda ({arch})"
    assert (
        f"attention_mla(latent_dim=512, num_heads=16, rope_dim=64) in bfloat16 on {place}" in text
    )
    asked = [line for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    chosen = [line for line in text.splitlines() if line.startswith("    * ")]
    assert len(asked) == len(chosen) > 20
    expected = "cpu" if arch == "cpu" else "triton"
    assert sum(expected in line for line in chosen) > 10


def test_timing_and_tuning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is written, rows of a second run join it, and selection reads it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    short = ("--seconds", "0.01", "--tokens", "1", "3")
    status, text = run_command(capsys, "bench", "--op", "rms_norm", "--json", *short)
    assert status == 0
    values = json.loads(text)
    assert {v["tokens"] for v in values} == {1, 3}
    assert all(v["us"]["cpu"] > 0 and v["gb_per_s"]["cpu"] > 0 for v in values)
    for op in ("rms_norm", "silu_mul"):
        assert run_command(capsys, "tune", "--op", op, *short)[0] == 0
    (path,) = (tmp_path / "tokenspeed" / "kernels").glob("*.json")
    table = TableFile.read(path)
    assert {key[0] for key in table.rows} == {"rms_norm", "silu_mul"}
    tables = Tables((path.parent,))
    found = tables.times("rms_norm", "cpu", "cpu", torch.bfloat16, {"size": 1024})
    assert set(found) == {1, 3}
    assert set(found[1]) == {"cpu"}  # the reference competes with nobody
    versions = {**table.machine.versions, "torch": "0.1"}
    TableFile(replace(table.machine, versions=versions), table.rows).save(path)
    tables = Tables((path.parent,))
    assert tables.times("rms_norm", "cpu", "cpu", torch.bfloat16, {"size": 1024}) == {}
    assert "measured with torch 0.1; here is " in tables.ignored[str(path)]
    path.write_text("[]")
    tables = Tables((path.parent,))
    assert tables.times("rms_norm", "cpu", "cpu", torch.bfloat16, {"size": 1024}) == {}
    assert str(path) in tables.ignored


def row(times_us: dict[str, Any]) -> dict[str, Any]:
    return {"rows": [{"op": "add", "dtype": "float32", "shapes": {}, "times_us": times_us}]}


@pytest.mark.parametrize(
    "change",
    [
        {"machine": {"name": "x", "arch": "cpu", "versions": "1"}},
        row({"1": {"cpu": 10**400}}),
        row({"1": {"cpu": float("inf")}}),
        row({"-5": {"cpu": 1}}),
    ],
)
def test_a_broken_table_is_ignored(change: dict[str, Any], tmp_path: Path) -> None:
    machine = {"name": "x", "arch": "cpu", "versions": {}}
    text = json.dumps({"format": FORMAT, "machine": machine, "rows": []} | change)
    (tmp_path / "x.json").write_text(text)
    (tmp_path / "y.json").write_text("[" * 100_000)
    tables = Tables((tmp_path,))
    assert tables.times("add", "cpu", "cpu", torch.float32, {}) == {}
    assert len(tables.ignored) == 2


def test_a_requirement_that_raises_takes_only_its_backend_out(small: Registry) -> None:
    def broken(_: Ask) -> str:
        raise ZeroDivisionError("no")

    small.register("double", "evil", lambda x: x, requires=broken, priority=50)
    [verdict] = [v for v in small.explain(ask()) if v.backend == "evil"]
    assert verdict.reason == "its requirement raised ZeroDivisionError: no"
    assert not verdict.chosen
    with pytest.raises(ValueError, match="backend none of double: None is not callable"):
        small.register("double", "none", None)  # type: ignore[arg-type]


def test_shipped_tables_can_be_read() -> None:
    for path in SHIPPED.glob("*.json"):
        assert TableFile.read(path).rows
