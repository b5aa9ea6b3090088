# SPDX-License-Identifier: MIT
"""`tokenspeed plan` from the command line: what it prints, and how it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest

from tokenspeed.cli.main import build_parser, main
from tokenspeed.cli.plan import AXES
from tokenspeed.planner.catalog import find_config

SMALL = ["plan", "demo", "--gpu", "h200", "--context", "1024"]


def test_the_tables_name_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tp", "2", "--ep", "2", "--price-per-gpu-hour", "3"]) == 0
    text = capsys.readouterr().out
    for part in (
        "mesh tp 2 x ep 2",
        "model.layers.*.mlp.experts",
        "all_reduce tp 2, with add + norm",
        "left for keys and values",
        "longest context of one request",
        "collectives",
        "TPS per user",
        "price of 1M tokens, output",
        "estimates",
    ):
        assert part in text, part


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tp", "2", "--batch", "4", "--cached", "0.5", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mesh"] == {"tp": 2, "ep": 1, "dp": 1, "pp": 1}
    assert values["computed_tokens"] == 512
    assert values["tps_per_user"] == pytest.approx(1 / values["token_s"])
    assert values["token_s"] == pytest.approx(sum(values["decode_s"][0].values()))
    rate = values["output_tokens_per_minute_per_device"]
    assert rate == pytest.approx(60 * 4 / values["token_s"] / 2)
    assert values["price_per_million_tokens"] is None
    assert any(row["collective"].startswith("all_reduce tp 2") for row in values["compiled"])


def test_auto_prints_the_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--auto", "--count", "4", "--tps-floor", "500", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    rates = [each["output_tokens_per_minute_per_device"] for each in values["meshes"]]
    assert values["output_tokens_per_minute_per_device"] == max(rates)
    assert values["tps_per_user"] >= 500
    assert main([*SMALL, "--auto", "--count", "16"]) == 0
    text = capsys.readouterr().out
    assert "meshes above the floor, best first" in text
    assert "Meshes refused" in text
    assert "ep does not divide the experts" in text


def test_auto_keeps_a_batch_that_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--auto", "--count", "2", "--batch", "6", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {each["batch"] for each in values["meshes"]} == {6}


def test_a_folder_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(find_config("demo").read_text())
    assert main(["plan", str(tmp_path), "--context", "64"]) == 0
    assert "one rank" in capsys.readouterr().out


def test_without_axes_all_devices_share_all_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--count", "4", "--json"]) == 0
    mesh = json.loads(capsys.readouterr().out)["mesh"]
    assert mesh == {"tp": 4, "ep": 4, "dp": 1, "pp": 1}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nosuch"], "none of the shipped shapes"),
        (["demo", "--tp", "3"], "cannot be divided over 3 ranks of tp"),
        (["demo", "--tp", "5", "--ep", "5"], "5 ranks"),
        (["demo", "--tp", "2", "--count", "4"], "has 2 ranks, --count says 4"),
        (["demo", "--tp", "4", "--dp", "3", "--ep", "8"], "views of the same ranks"),
        (["demo", "--pp", "64"], "64 stages for"),
        (["demo", "--context", "1000000"], "fewer than --context 1000000"),
        (["demo", "--batch", "0"], "batch must be at least 1"),
        (["demo", "--auto"], "--count"),
        (["demo", "--auto", "--count", "2", "--tp", "2"], "no axis"),
        (["demo", "--count", "0"], "--count must be from 1 to"),
        (["demo", "--count", "100000000", "--auto"], "--count must be from 1 to"),
        (["demo", "--tp", "1000000000000"], "--tp must be from 1 to"),
        (["demo", "--tp", "4096", "--dp", "4096"], "more than 4096"),
        (["demo", "--price-per-gpu-hour", "-1"], "--price-per-gpu-hour must be from 0"),
        (["demo", "--price-per-gpu-hour", "nan", "--json"], "--price-per-gpu-hour must be from 0"),
        (["demo", "--memory-gib", "inf"], "--memory-gib must be from 0"),
        (["demo", "--tps-floor", "nan", "--count", "2", "--auto"], "--tps-floor must be from 0"),
        (["demo", "--redundant-experts", "-1"], "redundant_experts must be at least 0"),
        (["demo", "--page-size", "100000000000"], "a page of 100000000000 tokens takes"),
        (["~nobody-of-this-name"], "none of the shipped shapes"),
        (["demo", "--memory-gib", "2"], r"exceed the 2.0 GiB of a rank by 1.\d GiB"),
        (["demo", "--memory-gib", "2", "--auto", "--count", "2"], "does not fit in memory"),
        (["demo", "--batch", "90000"], r"\d+ such requests fit, or 90000 of \d+ tokens; 4 such"),
    ],
)
def test_refusals_are_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--gpu", "h200", *flags]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.count("\n") == 1
    assert re.search(words, caught.err), caught.err


@pytest.mark.parametrize("key", ["kv_lora_rank", "vocab_size", "architectures"])
def test_a_config_that_lacks_a_key_is_refused_by_it(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(find_config("demo").read_text())
    del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["plan", str(tmp_path)]) == 2
    assert key in capsys.readouterr().err


def test_fp8_blocks_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "minimax-m2", "--tp", "8", "--ep", "1", "--context", "64"]) == 2
    assert "192 each, no whole fp8 blocks of 128" in capsys.readouterr().err


def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plot.png"
    assert main([*SMALL, "--auto", "--count", "2", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*SMALL, "--count", "2", "--plot", str(tmp_path / "plot.nosuch")]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert main([*SMALL, "--count", "2", "--plot", str(tmp_path / "none" / "plot.png")]) == 1


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*SMALL, "--count", "2", "--plot", str(tmp_path / "plot.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_page_lists_every_flag() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    command = build_parser()._subparsers
    assert command is not None
    (choices,) = (a.choices for a in command._group_actions)
    assert isinstance(choices, dict)
    flags = {option for action in choices["plan"]._actions for option in action.option_strings}
    table = {
        word for row in page.splitlines() if row.startswith("| `--") for word in row.split("`")
    }
    shown = {word.split()[0] for word in table if word.startswith("--")}
    assert flags - {"-h", "--help", *(flag for flag, _ in AXES.values())} == shown


def test_a_hub_id_is_read_from_the_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "owner/model"]) == 2
    assert "no hub id in the local cache" in capsys.readouterr().err
    home, revision = tmp_path / "models--owner--model", "0" * 40
    for part in (home / "refs", home / "snapshots" / revision):
        part.mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    (home / "snapshots" / revision / "config.json").write_text(find_config("demo").read_text())
    assert main(["plan", "owner/model", "--context", "64"]) == 0
    assert "owner/model: " in capsys.readouterr().out
