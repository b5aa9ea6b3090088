# SPDX-License-Identifier: MIT
"""`tokenspeed bench` against scripted endpoints: what is sent, said, saved and refused."""

import argparse
import asyncio
import functools
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tokenspeed.bench import compare
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions, run_load
from tokenspeed.bench.measure import Price
from tokenspeed.bench.records import RequestRecord, Run, read_runs, write_runs
from tokenspeed.bench.workloads import fixed
from tokenspeed.cli import bench_options
from tokenspeed.cli.main import build_parser, main

SMALL = ["--workload", "published", "--scale", "64", "--tokens-per-word", "1"]


class Stream(httpx.AsyncByteStream):
    def __init__(self, events: list[dict[str, Any]], pause_s: float) -> None:
        self._events, self._pause_s = events, pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in self._events:
            await asyncio.sleep(self._pause_s)
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"


class Server:
    """Answers each request with as many tokens as it asks for; keeps what it was sent.

    `slow_above`: so many streams at once are fast, more are slow. `dead`: host names whose
    connections break.
    """

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[httpx.Headers] = []
        self.open = self.most_open = self.requests = 0
        self.slow_above = 1000
        self.dead: set[str] = set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        if request.url.host in self.dead:
            raise httpx.ConnectError("nobody listens")
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "scripted"}]})
        if request.method == "GET":
            return httpx.Response(200)
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": [1] * len(body["prompt"].split())})
        self.bodies.append((request.url.path, body))
        self.headers.append(request.headers)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        pause_s = 0.05 if self.open > self.slow_above else 0.002
        await asyncio.sleep(0.002)
        self.open -= 1
        return httpx.Response(200, stream=Stream(self._events(request.url.path, body), pause_s))

    def _events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        count = body["max_tokens"]
        said = {"text": "w"} if path == "/v1/completions" else {"delta": {"content": "w"}}
        usage = {"prompt_tokens": 100, "completion_tokens": count}
        cached = {"prompt_tokens_details": {"cached_tokens": 60}}
        return [
            *({"choices": [said]} for _ in range(count)),
            {"choices": [{"finish_reason": "length"}], "usage": usage | cached},
        ]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    served = Server()
    transport = httpx.MockTransport(served)
    monkeypatch.setattr(compare, "run_load", functools.partial(run_load, transport=transport))
    calibrate = functools.partial(compare.calibrate, transport=transport)
    monkeypatch.setattr(compare, "calibrate", calibrate)
    return served


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


def ended(**given: Any) -> Run:
    """A run that is over: one stream of 2 tokens per second."""
    times = [1.0 + 0.5 * i for i in range(5)]
    record = RequestRecord(
        "s", 0, "ours", "chat", "user", 5, 0.5, 1.0, 3.0, "ok", 200, None, 100, 60, 5, None, times,
        [1] * 5,
    )  # fmt: skip
    values = {
        "endpoint": "ours", "base_url": "http://h", "model": "m", "started_at": "2026-01-02",
        "duration_s": 10.0, "workload": "w", "seed": 0, "scale": 1.0, "dialect": "chat",
        "concurrency": 2,
    }  # fmt: skip
    return Run(**(values | given), records=[record])


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
        ("serve --num-prompts 0", "requests must be at least 1"),
        ("offline --num-prompts 0", "requests must be at least 1"),
        ("offline --input-len 0", "input_tokens must be at least 1"),
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


@pytest.mark.parametrize(
    ("backend", "path"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_serve_speaks_its_backend(
    backend: str,
    path: str,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (
        f"serve --backend {backend} --base-url http://h --endpoint {path} --model m --seed 3"
        " --dataset-name random --random-input-len 8 --random-output-len 5 --num-prompts 6"
        " --request-rate inf --max-concurrency 2 --ignore-eos --save-result"
        f" --result-filename {tmp_path}/r.json --percentile-metrics ttft,e2el"
        " --metric-percentiles 50,99"
    )
    assert main(["bench", *words.split()]) == 0
    assert [sent for sent, _ in server.bodies] == [path] * 6
    assert server.most_open == 2
    body = server.bodies[0][1]
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("m", 5, True)
    asked = body["prompt"] if backend == "openai" else body["messages"][0]["content"]
    assert len(asked.split()) in (7, 8, 9)
    saved = json.loads((tmp_path / "r.json").read_text())
    wanted = {"completed": 6, "failed": 0, "total_output_tokens": 30, "backend": backend}
    assert wanted.items() <= saved.items()
    assert {"p50_ttft_ms", "p99_ttft_ms", "mean_e2el_ms"} <= saved.keys()
    assert "mean_tpot_ms" not in saved
    text = capsys.readouterr().out
    assert "Successful requests:                             6" in text
    assert "P99 E2EL (ms):" in text


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


def test_the_rate_spreads_requests(server: Server) -> None:
    words = "serve --num-prompts 12 --random-output-len 1 --random-input-len 4 --request-rate 40"
    assert main(["bench", *words.split()]) == 0
    assert server.most_open < 6


def test_agentic_fills_its_folder(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = [*SMALL, "--sessions", "3", "--time-scale", "0", "--floor", "5", "900"]
    words += ["--api-key", "sesame", "--header", "x-tokenspeed-tps-floor=5", "--name", "ours"]
    assert main(["bench", "agentic", *words, "--output", str(tmp_path)]) == 0
    (run,) = read_runs(tmp_path / "raw.jsonl")
    assert len(run.records) == len(server.bodies) > 25
    assert {record.cached_tokens for record in run.records} == {60}
    assert server.headers[0]["authorization"] == "Bearer sesame"
    assert server.headers[0]["x-tokenspeed-tps-floor"] == "5"
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last == json.loads((tmp_path / "summary.json").read_text())
    assert last["benchmark"] == "agentic"
    assert [floor["floor"] for floor in last["runs"][0]["floors"]] == [5.0, 900.0]
    assert "floor 900: goodput: users held at once" in out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == 2  # first tokens and the timeline: one run is no frontier
    assert "published, seed 0, lengths divided by" in page
    for path in tmp_path.iterdir():
        assert "sesame" not in path.read_text()


def test_a_report_shows_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenspeed.cli.bench_run import facts_of

    words = "bench compare --endpoint a=http://a,api_key=S3,model=m --api-key S3 --api-key=S3"
    words += " --header authorization=S3 --header=x=S3 --seed 3"
    monkeypatch.setattr("sys.argv", ["/bin/tokenspeed", *words.split()])
    command = facts_of()["command"]
    assert "S3" not in command
    assert command.startswith("tokenspeed bench compare --endpoint a=http://a,api_key=...,model=m")
    assert command.endswith("--seed 3")


def test_without_matplotlib_nothing_is_sent(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing: Callable[[str], Any] = lambda name: None if name == "matplotlib" else object()  # noqa: E731
    monkeypatch.setattr("tokenspeed.cli.bench_run.find_spec", missing)
    assert main(["bench", "agentic", *SMALL, "--output", str(tmp_path / "x")]) == 2
    assert "pip install tokenspeed[plot]" in capsys.readouterr().err
    assert server.bodies == []


def test_pareto_runs_each_load_with_words_of_its_own(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = [*SMALL, "--sessions-per-stream", "1", "--concurrency", "4", "1", "2"]
    assert main(["bench", "pareto", *words, "--floor", "9", "--output", str(tmp_path)]) == 0
    runs = read_runs(tmp_path / "raw.jsonl")
    assert [run.concurrency for run in runs] == [1, 2, 4]
    assert [len({r.session_id for r in run.records}) for run in runs] == [1, 2, 4]
    assert server.most_open == 4
    assert len({run.seed for run in runs}) == 3
    first = [body["messages"][0]["content"] for _, body in server.bodies]
    assert first[0] != first[len(runs[0].records)]  # the same session's first prompt
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == 6
    assert page.count("<details>") == 3  # three timelines are too many to be open
    assert "tokenspeed, 4 at once" in capsys.readouterr().out


def test_capacity_finds_where_streams_get_slow(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.slow_above = 0
    words = [*SMALL, "--sessions-per-stream", "1", "--most", "4"]
    assert main(["bench", "capacity", *words, "--floor", "1000"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["streams"], found["capped"], len(found["runs"])) == (0, False, 1)
    server.slow_above = 1000
    assert main(["bench", "capacity", *words, "--floor", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["streams"], found["capped"], len(found["runs"])) == (4, True, 3)


def test_compare_keeps_what_a_dead_endpoint_left(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    server.dead = {"gone"}
    words = [*SMALL, "--sessions-per-stream", "2", "--concurrency", "2"]
    words += ["--endpoint", "ours=http://here,model=m", "--endpoint", "theirs=http://gone"]
    assert main(["bench", "compare", *words, "--output", str(tmp_path)]) == 0
    runs = read_runs(tmp_path / "raw.jsonl")
    assert [(run.endpoint, run.concurrency) for run in runs] == [("ours", 2), ("theirs", 2)]
    caught = capsys.readouterr()
    assert "theirs, 2 at once: the endpoint died" in caught.err
    assert "nobody listens" in (tmp_path / "report.html").read_text()
    assert "ours, 2 at once" in caught.out


def test_nothing_answered_is_a_failure(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.dead = {"gone"}
    words = ["--base-url", "http://gone", "--sessions", "1", *SMALL]
    assert main(["bench", "agentic", *words]) == 1
    assert "not one request was answered" in capsys.readouterr().err


def test_offline_counts_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    asked: list[list[int]] = []

    class Engine:
        def __init__(self, **_: object) -> None: ...
        def __enter__(self) -> "Engine":
            return self

        def __exit__(self, *_: object) -> None: ...
        def get_tokenizer(self) -> Any:
            return SimpleNamespace(encode=lambda text, add_special_tokens: [1, 2, 3])

        def generate(self, prompts: list[Any], params: Any, *, use_tqdm: bool) -> list[Any]:
            asked.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
            answer = SimpleNamespace(token_ids=[7] * params.max_tokens)
            return [
                SimpleNamespace(outputs=[answer], num_cached_tokens=1, **prompt)
                for prompt in prompts
            ]

    monkeypatch.setattr("tokenspeed.llm.LLM", Engine)
    words = "offline --input-len 20 --output-len 4 --num-prompts 3 --prompt-seed 1"
    assert main(["bench", *words.split()]) == 0
    assert asked == [[20], [20, 20, 20]]  # the first is for warmth and is not counted
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    wanted = {"requests": 3, "prompt_tokens": 60, "output_tokens": 12, "cached_prompt_tokens": 3}
    assert wanted.items() <= found.items()
