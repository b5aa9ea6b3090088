# SPDX-License-Identifier: MIT
"""The pure parts of `benchmarks/client_agreement.py`: loads, what clients leave, and verdicts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import client_agreement  # noqa: E402
from bench_clients.lineup import CLIENTS  # noqa: E402
from bench_clients.load import Load, Place, our_figures  # noqa: E402
from bench_clients.server import requests_since  # noqa: E402
from client_agreement import Seen, Verdict  # noqa: E402

FIGURES = {
    "requests": 2,
    "output_tokens": 16,
    "input_tokens": 200,
    "output_tokens_per_s": 40.0,
    "ttft_mean_ms": 120.0,
    "ttft_p50_ms": 110.0,
    "tpot_mean_ms": 12.0,
    "tpot_p50_ms": 11.0,
    "itl_mean_ms": 13.0,
}
SERVING = {
    "completed": 2,
    "total_output_tokens": 16,
    "total_input_tokens": 200,
    "output_throughput": 40.0,
    "mean_ttft_ms": 120.0,
    "median_ttft_ms": 110.0,
    "mean_tpot_ms": 12.0,
    "median_tpot_ms": 11.0,
    "mean_itl_ms": 13.0,
}
LOGGED = {"requests": 2, "output_tokens": 16, "input_tokens": 200}


def place(folder: Path) -> Place:
    return Place("http://127.0.0.1:1", folder / "tokenizer", folder, 7, 1.5)


def avg(mean: float, p50: float | None = None) -> dict[str, float | None]:
    return {"avg": mean, "p50": p50}


def of_all(**told: Any) -> dict[str, dict[str, Any]]:
    return {"successful": told}


def left_behind(folder: Path) -> None:
    """The files of each client, with what else stands in them beside what is read."""
    (folder / "vllm.json").write_text(json.dumps(SERVING | {"p99_ttft_ms": 1.0}))
    aiperf = {
        "request_count": avg(2),
        "total_osl": avg(16),
        "total_isl": avg(200),
        "output_token_throughput": avg(40.0),
        "time_to_first_token": avg(120.0, 110.0),
        "inter_token_latency": avg(12.0, 11.0),
        "inter_chunk_latency": avg(13.0, 5.0),
    }
    (folder / "profile_export_aiperf.json").write_text(json.dumps(aiperf))
    metrics = {
        "request_totals": {"successful": 2, "errored": 0},
        "turns": None,
        "output_token_count": of_all(total_sum=16.0),
        "prompt_token_count": of_all(total_sum=200.0),
        "output_tokens_per_second": of_all(mean=40.0, median=1.0),
        "time_to_first_token_ms": of_all(mean=120.0, median=110.0),
        "inter_token_latency_ms": of_all(mean=12.0, median=11.0),
        "time_per_output_token_ms": of_all(mean=27.0, median=26.0),
    }
    (folder / "guidellm.json").write_text(json.dumps({"benchmarks": [{"metrics": metrics}]}))
    own = folder / "evalscope" / "demo" / "parallel_1_number_2"
    own.mkdir(parents=True)
    summary = {
        "Success Requests": 2,
        "Avg Output Tokens": 8.0,
        "Avg Input Tokens": 100.0,
        "Output Throughput (tok/s)": 40.0,
        "Avg TTFT (ms)": 120.0,
        "Avg TPOT (ms)": 12.0,
        "Avg ITL (ms)": 13.0,
    }
    (own / "benchmark_summary.json").write_text(json.dumps(summary))
    rows = [
        {"Percentiles": name, "TTFT (ms)": ttft, "TPOT (ms)": tpot}
        for name, ttft, tpot in (("25%", 1.0, 2.0), ("50%", 110.0, 11.0), ("75%", 3.0, 4.0))
    ]
    (own / "benchmark_percentile.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("name", sorted(CLIENTS))
def test_what_each_client_leaves_is_read_under_our_names(name: str, tmp_path: Path) -> None:
    left_behind(tmp_path)
    expected = dict(FIGURES)
    if name != "vllm":  # nothing of theirs is what we call so
        del expected["itl_mean_ms"]
    assert CLIENTS[name].figures(tmp_path) == expected


def test_ours_is_read_from_what_serve_saves(tmp_path: Path) -> None:
    (tmp_path / "ours.json").write_text(json.dumps(SERVING))
    assert our_figures(tmp_path) == FIGURES


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("vllm", "--num-prompts 5 --max-concurrency 3"),
        ("vllm", "--random-input-len 1000 --random-output-len 128"),
        ("guidellm", "kind=concurrent,streams=3 --constraint kind=max_requests,count=5"),
        ("guidellm", "prompt_tokens=1000,output_tokens=128"),
        ("aiperf", "--concurrency 3 --conversation-num 2"),
        ("evalscope", "--number 2 --parallel 3 --max-tokens 64"),
    ],
)
def test_both_are_asked_for_the_same_load(name: str, asked: str, tmp_path: Path) -> None:
    load = Load(3, requests=5, sessions=2)
    theirs = " ".join(CLIENTS[name].command(tmp_path / "env", load, place(tmp_path)))
    ours = " ".join(CLIENTS[name].ours(load, place(tmp_path)))
    assert theirs.startswith(str(tmp_path / "env/bin"))
    assert asked in theirs
    if name in ("vllm", "guidellm"):
        assert "--random-input-len 1000 --random-output-len 128" in ours
        assert "--num-prompts 5 --max-concurrency 3" in ours
    else:
        assert "--sessions 2 --concurrency 3 --time-scale 0" in ours


def test_a_conversation_in_the_swe_smith_layout_is_what_the_user_adds(tmp_path: Path) -> None:
    load = Load(1, sessions=2, turns=3, first=300, growth=100, turn_output=40)
    file = place(tmp_path).write_swe_smith(load)
    conversations = json.loads(file.read_text())["conversations"]
    assert [len(turns) for turns in conversations] == [3, 3]
    assert [turn["prompt_tokens"] for turn in conversations[0]] == [300, 400, 500]
    for turns in conversations:
        assert [[one["role"] for one in turn["messages"]] for turn in turns] == [["user"]] * 3
        first, *more = (len(turn["messages"][0]["content"].split()) for turn in turns)
        assert first == pytest.approx(300 / 1.5, abs=5)
        assert more == pytest.approx([60 / 1.5] * 2, abs=3)  # the growth without the answer


def test_the_servers_log_is_read_behind_a_place(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO tokenspeed.requests: id=a status=200 output=1\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("INFO something else\n")
        file.write("INFO tokenspeed.requests: id=b status=400 error='too long'\n")
    assert requests_since(log, start) == [{"id": "b", "status": "400", "error": "too long"}]


def test_what_the_server_did_not_answer_is_told() -> None:
    line = {"status": "200", "prompt": "100", "cached": "64", "output": "5"}
    times = {"ttft_ms": "10.0", "total_ms": "50.0"}
    seen = client_agreement._seen(FIGURES, [line | times, {"status": "400", "error": "x"}])
    assert seen.refused == ["status=400 error=x"]
    assert seen.logged["requests"] == 1
    assert seen.logged["cached_tokens"] == 64
    assert seen.logged["ttft_mean_ms"] == 10.0
    assert seen.logged["tpot_p50_ms"] == 10.0
    assert client_agreement._unlike("it", seen) == [
        "it says 2 requests, the server's log 1",
        "it says 16 output_tokens, the server's log 5",
        "it says 200 input_tokens, the server's log 100",
    ]


def verdict(*pairs: tuple[dict[str, float], dict[str, float]]) -> Verdict:
    made = Verdict(CLIENTS["vllm"], "1")
    for one, two in pairs:
        made.pairs.append((Seen(FIGURES | one, LOGGED, []), Seen(FIGURES | two, LOGGED, [])))
    return made


def test_a_figure_agrees_by_its_median_ratio() -> None:
    same: dict[str, float] = {}
    found = verdict(({"ttft_mean_ms": 240.0}, same), ({"ttft_mean_ms": 124.0}, same), (same, same))
    assert found.ratio("ttft_mean_ms") == pytest.approx(124 / 120)
    assert found.agrees("ttft_mean_ms", 0.05)
    assert not found.agrees("ttft_mean_ms", 0.03)
    assert client_agreement._about(found, 0.05)["agrees"]
    assert client_agreement._about(found, 0.03)["differs"] == ["ttft_mean_ms"]
    assert "ttft_mean_ms" in client_agreement._table(found, 0.03)
    assert client_agreement._table(found, 0.03).count("differs") == 1


def test_a_slower_server_is_taken_out_by_its_log() -> None:
    found = Verdict(CLIENTS["vllm"], "1")
    slow = Seen(FIGURES | {"ttft_mean_ms": 242.0}, LOGGED | {"ttft_mean_ms": 220.0}, [])
    found.pairs.append((slow, Seen(FIGURES, LOGGED | {"ttft_mean_ms": 110.0}, [])))
    assert found.ratio("ttft_mean_ms") == pytest.approx(242 / 120)
    assert found.ratio_by_log("ttft_mean_ms") == pytest.approx(1.1 / (120 / 110))
    assert found.ratio_by_log("itl_mean_ms") is None
    assert found.ratio_by_log("input_tokens") is None


def test_counts_must_be_equal_and_no_pair_is_no_agreement() -> None:
    assert not verdict(({"output_tokens": 16.1}, {})).agrees("output_tokens", 0.05)
    assert not client_agreement._about(Verdict(CLIENTS["vllm"], "1"), 0.05)["agrees"]
    troubled = verdict(({}, {}))
    troubled.trouble.append("status=400")
    assert not client_agreement._about(troubled, 0.05)["agrees"]
