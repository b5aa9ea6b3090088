# SPDX-License-Identifier: MIT
"""The pure parts of `benchmarks/cpu_peers.py`, and its protocol with an engine made of nothing."""

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    checkpoints, figures, lineup, report, roofs, summary, worker = (
        importlib.import_module(f"peers.{name}")
        for name in "checkpoints figures lineup report roofs summary worker".split()
    )
    engines: Any = importlib.import_module("peers.engines")
finally:
    sys.path.remove(str(BENCHMARKS))

DENSE, LATENT = checkpoints.CONFIGS["dense"], checkpoints.CONFIGS["mla-moe"]
ROOFS = roofs.Roofs(read_gb_s=50.0, bf16_tflop_s=1.0, int8_top_s=2.0)
FAKE = """
import sys, time
sys.path.insert(0, {workers!r})
from worker_loop import serve

class Fake:
    versions = {{"fake": "1"}}
    def __init__(self, options):
        print("engines print what they like")
        if options.get("broken"):
            raise ValueError("no such model")
    def generate(self, prompts, num_tokens):
        if prompts == [[13]]:
            raise RuntimeError("unlucky")
        short = prompts == [[7]]
        return [[time.perf_counter()] * (num_tokens - short) for _ in prompts]
    def logits(self, prompt):
        return [0.5, -1.25, float(len(prompt))]

serve(Fake)
"""


def start(tmp_path: Path, **options: Any) -> Any:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(workers=str(worker.WORKERS)))
    command = [sys.executable, str(script), json.dumps(options)]
    return worker.Worker("fake", command, tmp_path / "log", timeout_s=60)


def test_a_worker_answers_times_and_logits(tmp_path: Path) -> None:
    engine = start(tmp_path)
    try:
        assert engine.versions == {"fake": "1"}
        assert engine.start_s > 0
        times = engine.generate([[1, 2], [3]], 4)
        assert [len(stream) for stream in times] == [4, 4]
        assert all(0 <= at < 60 for stream in times for at in stream)
        assert engine.logits([1, 2, 3]) == [0.5, -1.25, 3.0]
    finally:
        engine.close()


def test_a_worker_says_what_it_cannot_and_goes_on(tmp_path: Path) -> None:
    engine = start(tmp_path)
    try:
        with pytest.raises(worker.WorkerError, match="unlucky"):
            engine.generate([[13]], 1)
        with pytest.raises(worker.WorkerError, match="asked for 3 tokens each"):
            engine.generate([[7]], 3)
        assert len(engine.generate([[1]], 3)[0]) == 3
    finally:
        engine.close()
    with pytest.raises(worker.WorkerError, match="ended"):
        engine.generate([[1]], 1)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(worker.WorkerError, match="ValueError: no such model"):
        start(tmp_path, broken=True)


def test_a_paused_worker_runs_no_further_and_has_memory(tmp_path: Path) -> None:
    engine = start(tmp_path)
    try:
        engine.pause()
        with pytest.raises(worker.WorkerError, match="no answer"):
            engine.generate([[1]], 1, timeout_s=0.2)
        memory = engine.memory()
        assert 1e6 < memory.anonymous <= memory.pss < 1e9
    finally:
        engine.close()


def test_who_cannot_start_or_answer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(workers=str(worker.WORKERS)))
    home = importlib.import_module("peers.setup").Home(tmp_path)
    line = lineup.Lineup(home, "dense", "bf16", 2, [])
    for name, options in (("good", {}), ("broken", {"broken": True}), ("unlucky", {})):
        monkeypatch.setitem(lineup.ENGINES, name, engines.Engine(name, "", None, {}))
        line._commands[name] = [sys.executable, str(script), json.dumps(options)]
    answered = []

    def work(one: Any) -> None:
        answered.append(one.generate([[13 if one.name == "unlucky" else 1]], 2))

    try:
        line.start(2)
        assert line.ready == ["good", "unlucky"]
        assert {name: len(found) for name, found in line.starts.items()} == {
            "good": 2,
            "unlucky": 2,
        }
        for name in line.ready:
            line.turn(name, work)
    finally:
        line.close()
    assert len(answered) == 1
    assert line.left_out["broken"].startswith("ValueError: no such model")
    assert line.left_out["unlucky"].startswith("RuntimeError: unlucky")


def test_times_become_rates() -> None:
    asked: list[tuple[int, ...]] = []

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        asked.append((len(prompts), len(prompts[0]), num_tokens))
        return [[2.0 + s + 0.5 * i for i in range(num_tokens)] for s in range(len(prompts))]

    rng = random.Random(1)
    assert figures.short(generate, rng) == {"prefill_512": 256.0, "decode_512": 2.0}
    assert figures.long(generate, rng) == {"prefill_4096": 2048.0, "decode_4096": 2.0}
    assert figures.streams(generate, rng) == {"streams_8": 16.0}  # 8 streams at 2 a second
    assert figures.warm(generate, rng) == {"cold_3072": 2.0, "warm_3072": 2.0}
    assert asked == [(1, 512, 65), (1, 4096, 33), (8, 512, 49), (1, 3072, 1), (1, 3104, 1)]


def test_streams_count_only_while_all_decode() -> None:
    assert figures.together([[0.0, 1.0, 2.0, 3.0], [2.0, 2.5, 3.0, 9.0]]) == 3.0
    with pytest.raises(ValueError, match="ended before"):
        figures.together([[0.0, 1.0], [1.0, 2.0]])


def test_errors_of_logits_ignore_a_constant() -> None:
    reference = [1.0, -1.0, 3.0, -3.0]
    assert figures.logits_error([11.0, 9.0, 13.0, 7.0], reference) == (0.0, 0.0)
    rms, largest = figures.logits_error([2.0, -2.0, 3.0, -3.0], reference)
    assert rms == pytest.approx((2 / 20) ** 0.5)
    assert largest == 1.0
    with pytest.raises(ValueError, match="1 logits, 4"):
        figures.logits_error([1.0], reference)


def test_checkpoints_have_the_sizes_they_claim() -> None:
    total = {name: roofs.held_bytes(c, "bf16") for name, c in checkpoints.CONFIGS.items()}
    assert total["dense"] / 1e6 == pytest.approx(1015, abs=1)
    assert total["mla-moe"] / 1e6 == pytest.approx(893, abs=1)
    assert roofs.kv_token_bytes(DENSE) == 114_688
    assert roofs.kv_token_bytes(LATENT) == 13_824


def test_roofs_follow_bytes_and_operations() -> None:
    assert roofs.weight_bytes(DENSE, "bf16", 1) == roofs.weight_bytes(DENSE, "bf16", 8)
    one, eight = (roofs.weight_bytes(LATENT, "bf16", batch) for batch in (1, 8))
    assert 0.40e9 < one < 0.42e9  # 4 of 16 experts
    assert 0.75e9 < eight < 0.826e9
    dense = roofs.at_most(DENSE, "bf16", ROOFS)
    assert dense["decode_512"] == pytest.approx(50e9 / (948e6 + 544 * 114_688), rel=1e-3)
    assert dense["decode_4096"] < dense["decode_512"] < dense["streams_8"]
    assert dense["prefill_4096"] < dense["prefill_512"] < 1e12 / (2 * 440e6)
    assert roofs.at_most(DENSE, "int8", ROOFS)["decode_512"] > 1.7 * dense["decode_512"]


def test_ours_is_held_against_the_best_peer() -> None:
    rounds = {
        "tokenspeed": {"decode_512": [10.0, 12.0, 30.0], "start": [2.0], "warm_3072": [0.5]},
        "slow": {"decode_512": [1.0, 2.0, 3.0], "warm_3072": [0.9]},
        "fast": {"decode_512": [8.0, 10.0, 9.0], "warm_3072": [1.0]},
    }
    lines = {
        line.figure: line for line in summary.compare(rounds, summary.aims_of("dense", "bf16"))
    }
    assert "start" not in lines  # no peer has one
    decode, warm = lines["decode_512"], lines["warm_3072"]
    assert (decode.ours, decode.best, decode.best_engine) == (12.0, 9.0, "fast")
    assert decode.ratio == pytest.approx(4 / 3)
    assert decode.spread == pytest.approx((1.2, 30 / 9))
    assert decode.met is True
    assert (warm.best_engine, warm.ratio, warm.met) == ("slow", pytest.approx(5 / 9), True)
    worse = summary.compare(
        rounds | {"faster": {"decode_512": [11.0]}}, summary.aims_of("dense", "bf16")
    )
    assert [line.met for line in worse if line.figure == "decode_512"] == [False]


def test_limits_hold_ours_alone() -> None:
    middle = {"start": 3.5, "decode_512": 45.0, "memory": 2000.0}
    found = summary.limits(middle, {"decode_512": 50.0}, 1700.0)
    assert [(x["value"], x["met"]) for x in found] == [(3.5, False), (0.9, True), (300.0, True)]


def test_pages_show_engines_ratios_and_who_was_left_out() -> None:
    rounds = {"tokenspeed": {"decode_512": [12.0]}, "other": {"decode_512": [8.0]}}
    lines = summary.compare(rounds, summary.aims_of("dense", "bf16"))
    group = {
        "model": "dense",
        "weights": "bf16",
        "medians": summary.medians(rounds),
        "roof": roofs.at_most(DENSE, "bf16", ROOFS),
        "comparison": [vars(line) | {"met": line.met} for line in lines],
        "limits": summary.limits({"decode_512": 12.0}, {"decode_512": 48.0}, 0),
        "left_out": {"third": "its wheel is gone"},
        "versions": {"other": {"other-package": "3.1"}},
    }
    assert report.table(group)[2] == ["tokenspeed", "12.0"]
    assert report.ratios(group)[1][3:8] == ["other", "1.50", "1.50 to 1.50", ">= 1.1", "yes"]
    lengths = {len(line) for line in report.text(report.table(group)).splitlines()}
    assert len(lengths) <= 2  # only what ends in spaces is shorter
    page = report.markdown(
        {
            "machine": {"cpu": "a CPU", "load": [0.1]},
            "threads": 2,
            "date": "today",
            "command": "python x.py",
            "rounds": 1,
            "roofs": vars(ROOFS),
            "groups": [group],
        }
    )
    for words in ("a CPU", "| other | 8.0 |", "Left out: third: its wheel is gone", "3.1", "NO"):
        assert words in page


def test_every_engine_is_whole() -> None:
    for engine in engines.ENGINES.values():
        assert (worker.WORKERS / engine.script).is_file()
        assert engine.environment is None or engine.environment in engines.ENVIRONMENTS
        assert not engine.kind or engines.CONVERTERS[engine.kind] in engines.ENVIRONMENTS
        assert engine.formats.keys() <= roofs.BITS.keys()
        for model in engine.models:
            weights = next(iter(engine.formats))
            options = lineup.worker_options(engine.name, Path("x"), model, weights, 2)
            assert options["kv_bytes"] == 8192 * roofs.kv_token_bytes(checkpoints.CONFIGS[model])


def test_the_script_refuses_what_it_does_not_know() -> None:
    script = [sys.executable, str(BENCHMARKS / "cpu_peers.py"), "--engines", "abacus"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no abacus; known" in done.stderr
