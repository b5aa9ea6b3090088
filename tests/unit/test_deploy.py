# SPDX-License-Identifier: MIT
"""deploy/: rules and panels name what /metrics really has, with labels that it really has.

Where Prometheus is installed (Debian's package `prometheus` has both programs), the full suite has
promtool check and try the rules, and a real Prometheus scrape a server and answer every expression.
"""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.processes import server
from tokenspeed.engine.messages import DrafterStats, EngineStats, SpeculationStats
from tokenspeed.gateway.exposition import exposition
from tokenspeed.gateway.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
BOARD = json.loads((DEPLOY / "grafana" / "tokenspeed.json").read_text())
FUNCTIONS = {
    *("avg", "by", "histogram_quantile", "increase", "label_values", "max", "min_over_time"),
    *("rate", "sum", "and", "or"),
}
OF_PROMETHEUS = {"up": {"job", "instance"}}
ADDED = {"job", "instance"}  # to every sample, by the scrape

_missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
real = pytest.mark.skipif(bool(_missing), reason=f"not installed: {', '.join(_missing)}")


def exposed() -> dict[str, set[str]]:
    """Every sample that /metrics can have, and its labels."""
    metrics = Metrics("m")
    metrics.rejections["full"] = 1
    engine = metrics.engines[0]
    engine.finished["stop"] = 1
    drafters = [DrafterStats("suffix", 1, 1, 1, [1])]
    engine.stats = EngineStats(speculation=SpeculationStats(drafters, [1]))
    text = exposition(metrics).decode()
    samples = (sample for f in text_string_to_metric_families(text) for sample in f.samples)
    found: dict[str, set[str]] = {}
    for sample in samples:
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def board_expressions() -> list[str]:
    found = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return [
        *found,
        *(one["query"] for one in BOARD["templating"]["list"] if one["type"] == "query"),
    ]


@cache
def known() -> dict[str, set[str]]:
    recorded = {rule["record"]: {"model_name"} for rule in rules() if "record" in rule}
    return {name: labels | ADDED for name, labels in exposed().items()} | OF_PROMETHEUS | recorded


def strangers(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What in an expression is no metric, no label of its metric and no function."""
    found = []
    bare = re.sub(r"\[[^]]*\]", "", expression)
    labels = {label for name in re.findall(r"[a-z_:0-9]+", bare) for label in known.get(name, ())}
    for name, inside in re.findall(r"([a-zA-Z_:][\w:]*)\s*{([^}]*)}", bare):
        asked = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", inside))
        found += sorted(asked - known.get(name, set()))
    for inside in re.findall(r"\bby \(([^)]*)\)", bare):
        found += sorted(set(re.split(r",\s*", inside)) - labels)
    bare = re.sub(r"{[^}]*}|\bby \([^)]*\)|label_values\(|,\s*model_name\)", " ", bare)
    names = set(re.findall(r"[a-zA-Z_:][\w:]*", bare))
    return found + sorted(names - FUNCTIONS - known.keys())


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_name_what_is_there(rule: dict[str, Any]) -> None:
    assert strangers(rule["expr"], known()) == []
    texts = " ".join(rule.get("annotations", {}).values())
    for label in re.findall(r"\$labels\.(\w+)", texts):
        by = re.search(r"by \(([^)]*)\)", rule["expr"])
        assert by is None or label in by[1]


@pytest.mark.parametrize("expression", board_expressions())
def test_panels_name_what_is_there(expression: str) -> None:
    assert strangers(expression, known()) == []


def test_what_is_not_there_is_noticed() -> None:
    for wrong in (
        "sum(rate(vllm:no_such_metric_total[5m]))",
        'tokenspeed:stream_seconds_total{flor="held"}',
        "sum by (engin) (vllm:num_requests_running)",
        "vllm:generation_tokens",  # the counter's name without its ending
    ):
        assert strangers(wrong, known()) != [], wrong


def test_the_board_is_whole() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))  # nothing lies on anything
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"]} == {"${datasource}"}


# With the real thing.


def promtool(*arguments: str, text: str | None = None) -> str:
    command = ["promtool", *arguments]
    done = subprocess.run(
        command, cwd=RULES.parent, input=text, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@real
@pytest.mark.full
def test_promtool_takes_the_rules_and_they_do_what_they_say() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", "rules.yml")
    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "rules_test.yml")


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """The repository's configuration, with another target and a shorter interval."""
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=10) as http:
            yield http
    finally:
        process.terminate()
        process.wait(20)


def ask(http: httpx.Client, expression: str) -> list[Any]:
    reply = http.get("/api/v1/query", params={"query": expression}).json()
    assert reply["status"] == "success", (expression, reply)
    return list(reply["data"]["result"])


def until(done: Any) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            if found := done():
                return found
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


@real
@pytest.mark.full
@pytest.mark.timeout(180)
def test_a_real_prometheus_scrapes_a_server_and_answers_every_expression(tmp_path: Path) -> None:
    with server("--step-s", "0.01") as s:
        metrics = httpx.get(f"{s.url}/metrics", trust_env=False).text
        floor = {"x-tokenspeed-tps-floor": "5"}
        body = {"prompt": "hello world", "max_tokens": 400}
        with prometheus(tmp_path, s.url.removeprefix("http://")) as http:
            until(lambda: ask(http, "up == 1"))
            until(lambda: ask(http, "tokenspeed:refusals:per_second5m == 0"))
            recorded = ask(http, '{__name__=~"tokenspeed:.+5m"}')
            assert {one["value"][1] for one in recorded} == {"0"}  # nobody has asked: no NaN
            httpx.post(f"{s.url}/v1/completions", json=body, headers=floor, trust_env=False)
            until(lambda: ask(http, "increase(vllm:generation_tokens_total[1m]) > 0"))
            held = 'increase(tokenspeed:stream_seconds_total{floor="held"}[1m]) > 0'
            until(lambda: ask(http, held))
            # The names that this server has, whatever has happened to it.
            for name in set(re.findall(r"^((?:vllm|tokenspeed):\w+)", metrics, re.MULTILINE)):
                assert ask(http, name), name
            for expression in board_expressions():
                if "label_values" not in expression:
                    given = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
                    ask(http, given)
            until(lambda: ask(http, "tokenspeed:floor_attainment:ratio5m"))
            (found,) = ask(http, "tokenspeed:floor_attainment:ratio5m")
            assert found["metric"]["model_name"] == "null"
            assert float(found["value"][1]) == 1.0
            groups = http.get("/api/v1/rules").json()["data"]["groups"]
            health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
            assert set(health.values()) <= {"ok", "unknown"}
            assert not ask(http, 'ALERTS{alertstate="firing"}')
