# SPDX-License-Identifier: MIT
"""The flags of `tokenspeed bench`: each is read, arrives where it belongs, or is refused."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scripted_bench import Server, ended, scripted
from tokenspeed.bench import compare
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions
from tokenspeed.bench.measure import Price
from tokenspeed.bench.records import write_runs
from tokenspeed.bench.workloads import fixed
from tokenspeed.cli import bench_options
from tokenspeed.cli.main import build_parser, main


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return scripted(monkeypatch)


class Reads(argparse.Namespace):
    """Remembers which flags somebody asked for."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            vars(self).setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


COMMANDS = {
    "serve": "--num-prompts 2 --random-input-len 8 --random-output-len 2 --save-result "
    "--result-filename {folder}/r.json",
    "agentic": "--sessions 1 --time-scale 0 --output {folder} --workload published "
    "--scale 64 --tokens-per-word 1",
    "pareto": "--sessions-per-stream 1 --concurrency 1 --scale 64 --tokens-per-word 1",
    "capacity": "--sessions-per-stream 1 --floor 1 --most 1 --scale 64 --tokens-per-word 1",
    "compare": "--endpoint a=http://a --endpoint b=http://b --sessions-per-stream 1 "
    "--concurrency 1 --scale 64 --tokens-per-word 1",
    "report": "{folder}/raw.jsonl",
}


@pytest.mark.parametrize("action", COMMANDS)
def test_every_flag_is_read(action: str, server: Server, tmp_path: Path) -> None:
    if action == "report":
        write_runs(tmp_path / "raw.jsonl", [ended()])
    words = COMMANDS[action].format(folder=tmp_path).split()
    args = build_parser().parse_args(["bench", action, *words], namespace=Reads())
    flags = {each.dest for each in args.parser._actions} - {"help"}
    del vars(args)["_read"]
    assert args.run(args) == 0
    assert flags - vars(args)["_read"] == set()


def test_flags_arrive_where_they_belong() -> None:
    words = (
        "bench agentic --base-url http://h --name n --model m --api-key k --dialect messages"
        " --header a=b=c --workload random --sessions 3 --span 5 --scale 2 --seed 9"
        " --time-scale 0.5 --history answers --forced --stop-at-eos --retry 4 --duration 7"
        " --rounds 2 --stall 8 --concurrency 6 --floor 70 100 --devices 4"
        " --price-computed-input 1 --price-cached-input 2 --price-output 3 --price-device-hour 4"
    )
    args = build_parser().parse_args(words.split())
    assert bench_options.load_of(args, args.concurrency) == LoadOptions(
        concurrency=6, time_scale=0.5, history="answers", forced=True, ignore_eos=False,
        retries=4, duration_s=7.0, rounds=2, stall_s=8.0,
    )  # fmt: skip
    assert bench_options.endpoint_of(args) == Endpoint(
        "n", "http://h", "m", "messages", "k", headers={"a": "b=c"}
    )
    price = Price(computed_input=1.0, cached_input=2.0, output=3.0, device_hour=4.0)
    assert bench_options.judge_of(args) == compare.Judge((70.0, 100.0), price, 4)
    wanted = fixed.make(requests=3, seed=9, scale=2.0, span_s=5.0)
    assert bench_options.workload_of(args, args.sessions, args.span) == wanted


@pytest.mark.parametrize("name", ["generated", "published", "sharegpt", "random"])
def test_a_workload_is_the_one_named(name: str) -> None:
    words = f"bench agentic --workload {name} --sessions 2 --scale 8 --seed 4"
    args = build_parser().parse_args(words.split())
    workload = bench_options.workload_of(args, args.sessions)
    assert (workload.name, workload.seed) == (name, 4)
    assert len(workload.sessions) >= 2


def test_the_page_names_only_flags_that_are(repository: Path) -> None:
    text = (repository / "docs" / "benchmarking.md").read_text()
    named = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--enable-forced-output"}
    named -= {"--custom-dataset-type"}
    actions = build_parser()._subparsers._group_actions[0].choices["bench"]  # type: ignore[union-attr]
    known = set()
    for parser in actions._subparsers._group_actions[0].choices.values():
        known |= set(parser._option_string_actions)
    assert named <= known


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serve --num-promts 3", "did you mean --num-prompts?"),
        ("serve --dataset-name sonnet", "invalid choice: 'sonnet'"),
        ("serve --backend vllm", "invalid choice: 'vllm'"),
        ("serve --goodput ttft:100", "unrecognized arguments: --goodput"),
        ("agentic --concurrency x", "invalid int value"),
        ("capacity", "--floor"),
    ],
)
def test_a_flag_that_is_none_is_refused(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *words.split()])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "serve --endpoint /v1/chat/completions",
            "--endpoint /v1/chat/completions: backend openai",
        ),
        ("serve --dataset-name sharegpt --random-input-len 5", "--dataset-name random only"),
        (
            "serve --request-rate 3 --max-concurrency 2",
            "--max-concurrency needs --request-rate inf",
        ),
        ("serve --request-rate nan", "rate: must be finite"),
        ("serve --result-filename x.json", "--result-filename needs --save-result"),
        ("serve --percentile-metrics ttft,speed", "percentile-metrics: one of ttft"),
        ("serve --metric-percentiles 101", "metric-percentiles: must be from 0 to 100"),
        ("serve --metric-percentiles often", "--metric-percentiles: numbers with commas"),
        ("serve --num-prompts 0", "--num-prompts must be at least 1: 0"),
        ("serve --seed -1", "--seed must be at least 0: -1"),
        ("serve --random-prefix-len -5", "--random-prefix-len must be at least 0: -5"),
        ("serve --random-output-len 0", "--random-output-len must be at least 1: 0"),
        ("offline --num-prompts 0", "--num-prompts must be at least 1: 0"),
        ("offline --input-len 0", "--input-len must be at least 1: 0"),
        ("offline --prompt-seed -1", "--prompt-seed must be at least 0: -1"),
        ("agentic --workload published --seed -1", "--seed must be at least 0: -1"),
        ("agentic --workload random --sessions 0", "--sessions must be at least 1: 0"),
        ("pareto --workload published --seed -1", "--seed must be at least 0: -1"),
        ("agentic --concurrency 2 --rate 1", "--concurrency and --rate exclude"),
        (
            "agentic --rate 2 --time-scale 0.5",
            "--rate 2 and --time-scale 0.5 contradict each other",
        ),
        ("agentic --rate 2 --time-scale 0", "--rate 2 and --time-scale 0 contradict each other"),
        ("agentic --stall 0 --workload published", "stall_s: must be finite and positive"),
        ("pareto --stall nan", "stall_s: must be finite and positive"),
        ("agentic --concurrency 0 --workload published", "concurrency: must be at least 1"),
        ("agentic --floor 0", "--floor must be finite and positive"),
        ("agentic --floor nan", "--floor must be finite and positive"),
        ("agentic --devices 0", "--devices must be at least 1"),
        ("agentic --price-output -1", "--price-output must not be negative"),
        ("agentic --workload weka", "--workload weka needs --workload-file"),
        ("agentic --workload traces", "--workload traces without --workload-file: recorded"),
        ("agentic --workload published --workload-file x", "published is made, not read"),
        ("agentic --workload published --span nan", "--span must be finite"),
        ("agentic --workload mooncake --workload-file x --span 3", "--span: the lines of a"),
        ("agentic --workload published --header x", "--header: expected NAME=VALUE"),
        ("agentic --base-url localhost --workload published", "base_url: must be an http URL"),
        ("pareto --concurrency 0 2", "--concurrency must be at least 1"),
        ("pareto --sessions-per-stream 0", "--sessions-per-stream must be at least 1"),
        ("capacity --floor 20 --share 0", "--share must be above 0"),
        ("capacity --floor 20 --start 9 --most 8", "--start must be from 1 to --most"),
        ("compare --endpoint a=http://a", "compare needs two endpoints"),
        ("compare --endpoint http://a --endpoint b", "--endpoint: expected NAME=VALUE"),
        ("compare --endpoint a=http://a,modle=m --endpoint b=http://b", "'modle' is none of"),
        ("compare --endpoint a=http://a,token_counts=1 --endpoint b=http://b", "yes or no"),
    ],
)
def test_refusals_are_one_line(
    words: str,
    said: str,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TOKENSPEED_TRACES", raising=False)
    assert main(["bench", *words.split()]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert said in caught.err
    assert caught.err.count("\n") == 1
    assert server.requests == 0


def test_where_nothing_can_be_written_nothing_is_asked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "full" / "summary.json").mkdir(parents=True)
    few = "--num-prompts 1 --random-input-len 4 --random-output-len 1"
    for words, said in (
        (f"serve {few} --save-result --result-filename {tmp_path}/no/r.json", "No such file"),
        (f"serve {few} --save-result --result-filename {tmp_path}", "Is a directory"),
        (f"agentic --workload published --scale 64 --output {file}", "cannot be made: File exists"),
        (f"pareto --scale 64 --output {file}/x", "cannot be made: Not a directory"),
        (f"capacity --scale 64 --floor 1 --output {tmp_path}/full", "summary.json: cannot be writ"),
    ):
        assert main(["bench", *words.split()]) == 2, words
        caught = capsys.readouterr()
        assert said in caught.err
        assert caught.err.count("\n") == 1
    assert server.requests == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["summary.json"]


def test_what_was_saved_before_is_there_until_the_run_is_over(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "r.json"
    saved.write_text("before")
    server.dead = {"127.0.0.1"}
    words = "serve --num-prompts 1 --random-output-len 1 --random-input-len 4 --save-result"
    kept = saved.read_text()
    from tokenspeed.cli.bench_run import check_files

    check_files("--result-filename", saved)
    assert saved.read_text() == kept
    assert main(["bench", *words.split(), "--result-filename", str(saved)]) == 1
    assert json.loads(saved.read_text())["completed"] == 0
