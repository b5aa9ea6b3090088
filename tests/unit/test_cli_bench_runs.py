# SPDX-License-Identifier: MIT
"""Each command of `tokenspeed bench` against scripted endpoints: what is sent, said and saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scripted_bench import SMALL, Server, scripted
from tokenspeed.bench.records import read_runs
from tokenspeed.cli.main import main


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return scripted(monkeypatch)


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
