# SPDX-License-Identifier: MIT
"""`tokenspeed bench report`: runs that were saved, read back and shown."""

import json
from pathlib import Path

import pytest

from tests.unit.scripted_bench import SMALL, Server, ended, scripted
from tokenspeed.bench.records import write_runs
from tokenspeed.cli.main import main


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return scripted(monkeypatch)


def test_a_report_of_a_run_is_the_one_that_it_printed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = [*SMALL, "--sessions-per-stream", "1", "--concurrency", "1", "2", "--floor", "9"]
    assert main(["bench", "pareto", *words, "--output", str(tmp_path)]) == 0
    *before, last = capsys.readouterr().out.splitlines()
    raw, html = tmp_path / "raw.jsonl", tmp_path / "again.html"
    assert main(["bench", "report", str(raw), "--html", str(html), "--floor", "9"]) == 0
    *again, line = capsys.readouterr().out.splitlines()
    assert again == before
    assert json.loads(line)["runs"] == json.loads(last)["runs"]
    assert json.loads(line)["raw"] == str(raw)
    page, first = html.read_text(), (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == first.count("<svg ") == 5
    assert f"<dt>{raw}</dt>" in page


def test_runs_of_one_name_are_told_apart_by_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_runs(one, [ended(), ended(endpoint="theirs")])
    write_runs(two, [ended(concurrency=4), ended(concurrency=8)])
    assert main(["bench", "report", str(one), str(two)]) == 0
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [(run["endpoint"], run["concurrency"]) for run in runs] == [
        (f"ours ({one})", 2), ("theirs", 2), (f"ours ({two})", 4), (f"ours ({two})", 8),
    ]  # fmt: skip


def test_a_simulated_run_is_reported_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    raw, html = tmp_path / "day.jsonl", tmp_path / "day.html"
    begun = "1970-01-01T00:00:00+00:00"
    write_runs(raw, [ended(endpoint="simulation", base_url="", started_at=begun, dialect="none")])
    assert main(["bench", "report", str(raw), "--html", str(html)]) == 0
    assert "TPS of a stream, p50 / p10 / p1" in capsys.readouterr().out
    assert "1970" not in html.read_text()
    assert "endpoints: simulation;" in html.read_text()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("{folder}/none.jsonl", 1, "No such file"),
        ("{folder}/empty.jsonl", 2, "empty.jsonl: holds no run"),
        ("{folder}/other.jsonl", 2, "other.jsonl:1: "),
        ("{folder}/raw.jsonl {folder}/raw.jsonl", 2, "a raw file is given twice"),
        ("{folder}/raw.jsonl --html {folder}/no/x.html", 2, "--html {folder}/no/x.html: cannot be"),
        ("{folder}/raw.jsonl --floor 0", 2, "--floor must be finite and positive"),
    ],
)
def test_what_is_no_raw_file_is_refused(
    words: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    write_runs(tmp_path / "raw.jsonl", [ended()])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"figures": 1}\n')
    assert main(["bench", "report", *words.format(folder=tmp_path).split()]) == status
    caught = capsys.readouterr()
    assert (caught.out, caught.err.count("\n")) == ("", 1)
    assert said.format(folder=tmp_path) in caught.err


def test_a_report_shows_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenspeed.cli.bench_run import facts_of

    words = "bench compare --endpoint a=http://a,api_key=S3,model=m --api-key S3 --api-key=S3"
    words += " --header authorization=S3 --header=x=S3 --seed 3"
    monkeypatch.setattr("sys.argv", ["/bin/tokenspeed", *words.split()])
    command = facts_of()["command"]
    assert "S3" not in command
    assert command.startswith("tokenspeed bench compare --endpoint a=http://a,api_key=...,model=m")
    assert command.endswith("--seed 3")
