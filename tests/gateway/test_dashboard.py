# SPDX-License-Identifier: MIT
"""The page and its snapshots: who may read them, what they say, and that nothing is loaded."""

import asyncio
import itertools
import json
import re
from dataclasses import replace
from importlib.resources import files
from typing import Any

import httpx
import pytest

from tests.gateway.harness import gateway
from tests.gateway.processes import server
from tests.gateway.test_tenants import spec
from tokenspeed.engine import messages as m
from tokenspeed.gateway.dashboard import MAX_VIEWERS, look
from tokenspeed.gateway.dashboard_snapshot import COLUMNS, HISTORY, Watch
from tokenspeed.gateway.exposition import exposition
from tokenspeed.gateway.request_log import RequestRecord

FILES = {
    one.name: one.read_text()
    for one in files("tokenspeed.gateway").joinpath("dashboard_page").iterdir()
}
PAGE = FILES["page.html"]
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
TEXT = "/v1/completions"


def parsed(text: str) -> list[tuple[str, Any]]:
    blocks = [re.fullmatch(r"event: (\w+)\ndata: (.*)", b) for b in text.split("\n\n") if b]
    return [(found[1], json.loads(found[2])) for found in blocks]


def second(snapshot: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(COLUMNS, snapshot["second"], strict=True))


# The page.


async def test_the_page_needs_no_key_and_tells_nothing():
    async with gateway(keys=("k",)) as g:
        urls = {"/dashboard": "page.html"} | {f"/dashboard/files/{name}": name for name in FILES}
        for url, name in urls.items():
            reply = await g.http.get(url)
            assert reply.status_code == 200, url
            assert reply.text == FILES[name]  # whatever is served, however it is called
            kind = KINDS[name.rpartition(".")[2]]
            assert reply.headers["content-type"] == f"{kind}; charset=utf-8"
            assert reply.headers["x-content-type-options"] == "nosniff"
        for url in ("nothing.js", "%2e%2e%2fdashboard.py", "page.js%00", "", "PAGE.JS"):
            reply = await g.http.get(f"/dashboard/files/{url}")
            assert reply.status_code in (401, 404), url
            assert "import" not in reply.text


def test_the_page_is_small():
    assert sum(len(text.encode()) for text in FILES.values()) < 40_000
    for name, text in FILES.items():
        lines = text.splitlines()
        assert len(lines) < 400, name
        assert max(map(len, lines)) <= 110, name
        assert "SPDX-License-Identifier: MIT" in text[:80], name


def test_every_file_of_the_page_is_loaded_by_it():
    found = set(re.findall(r'"dashboard/files/([\w.]+)"', PAGE))
    for name in FILES:
        found |= set(re.findall(r'from "\./([\w.]+)"', FILES[name]))
    assert found | {"page.html"} == set(FILES)


OWN = ("data:,", "dashboard/events", "http://www.w3.org/2000/svg")  # a name that nobody fetches


def loads(text: str) -> list[str]:
    """Everything in a file that a browser would fetch, but for what its own server has."""
    found = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["'`]?([^"'`\s>]+)""", text)
    found += re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text)
    found += re.findall(
        r"""(?:fetch|import|importScripts|Worker|EventSource|WebSocket)\(\s*([^)\s,]+)""", text
    )
    found += re.findall(r"""(?:^|[\s};])(?:from|import)\s*["'`]([^"'`]+)["'`]""", text)
    found += re.findall(r"(?:https?:|wss?:|[\"'`(=])//[^\"'`\s)]+", text)
    own = {*OWN, *(f"./{name}" for name in FILES), *(f"dashboard/files/{name}" for name in FILES)}
    return [one for one in found if one.strip("\"'`") not in own]


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_page_loads_nothing_from_elsewhere(name: str):
    assert loads(FILES[name]) == []
    for hostile in (
        '<script src="https://cdn.example/x.js">',
        "<style>@import 'x.css'",
        "fetch('//a/b')",
        'import { chart } from "https://cdn.example/chart.js";',
        'import "//cdn.example/x.js"',
        "const there = await import(`//cdn.example/x.js`)",
        "a { background: url(//cdn.example/x.png) }",
        'new WebSocket("wss://cdn.example")',
        'const there = "//cdn.example/x.js"',
        "link.href = 'x.css'",
    ):
        assert loads(FILES[name] + hostile) != [], hostile


def test_the_page_has_nothing_inline():
    assert re.findall(r"<(?:script|style|link|img|iframe|object)\b[^>]*>", PAGE) == [
        '<link rel="icon" href="data:,">',
        '<link rel="stylesheet" href="dashboard/files/page.css">',
        '<script type="module" src="dashboard/files/page.js">',
    ]
    assert not re.search(r"\s(?:style|on\w+)\s*=", PAGE)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_text_of_a_client_becomes_markup(name: str):
    bad = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc"
    assert not re.search(bad, FILES[name])


async def test_the_policy_allows_the_pages_own_files_and_nothing_else():
    async with gateway() as g:
        for url in ("/dashboard", "/dashboard/files/page.js"):
            policy = (await g.http.get(url)).headers["content-security-policy"]
            rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
            assert rules == {
                "default-src": "'none'",
                "script-src": "'self'",
                "style-src": "'self'",
                "connect-src": "'self'",
                "img-src": "data:",
                "base-uri": "'none'",
                "form-action": "'none'",
                "frame-ancestors": "'none'",
                "require-trusted-types-for": "'script'",
                "trusted-types": "'none'",
            }


def test_the_page_asks_for_columns_that_there_are():
    """Its charts and tiles name them; a name that is none would be an empty chart."""
    text = FILES["charts.js"] + FILES["now.js"] + FILES["feed.js"]
    asked = set(re.findall(r"""\b(?:per|each|ms|rate)\("(\w+)"\)""", text))
    asked |= set(re.findall(r"""\bsum\((?:minute|long|rows|latest\(10\)), "(\w+)"\)""", text))
    asked |= {one for pair in re.findall(r'over\("(\w+)", "(\w+)"', text) for one in pair}
    asked |= set(re.findall(r"\bs => .*?\bs\.(\w+)", FILES["charts.js"]))
    assert asked <= set(COLUMNS)
    assert asked >= {"output", "held_s", "predicted_s", "measured_s", "prefill"}


# The events.


async def test_snapshots_are_for_admins():
    roles = {"all": ("inference", "metrics", "admin"), "admin": ("admin",)}
    others = {"worker": ("inference",), "scraper": ("metrics",), "both": ("inference", "metrics")}
    tenants = [spec(name, name, roles=role) for name, role in (roles | others).items()]
    async with gateway(tenants=tenants) as g:
        url = "/dashboard/events?count=0"
        assert (await g.http.get(url)).status_code == 401
        for name in others:
            reply = await g.http.get(url, headers={"x-api-key": name})
            assert reply.status_code == 403, name
            assert "history" not in reply.text
        for name in roles:
            reply = await g.http.get(url, headers={"x-api-key": name})
            assert reply.status_code == 200, name


async def test_history_comes_first_then_a_snapshot_a_look():
    async with gateway() as g:
        for _ in range(HISTORY + 3):
            g.service.watch.look()
        watching = asyncio.create_task(g.http.get("/dashboard/events?count=2"))
        for _ in range(2):
            while g.service.show.num_viewers == 0:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            await look(g.service)
        reply = await watching
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        (first, past), *rest = parsed(reply.text)
        assert (first, len(past["rows"])) == ("history", HISTORY)
        assert past["columns"] == list(COLUMNS)
        assert [kind for kind, _ in rest] == ["snapshot", "snapshot"]
        assert rest[0][1]["state"] == "ready"
        assert g.service.show.num_viewers == 0


async def test_who_watches_is_told_of_the_end():
    async with gateway() as g:
        watching = asyncio.create_task(g.http.get("/dashboard/events"))
        while g.service.show.num_viewers == 0:
            await asyncio.sleep(0)
        g.pool.draining = True
        while not watching.done():
            await look(g.service)
            await asyncio.sleep(0)
        assert parsed((await watching).text)[-1][1]["state"] == "draining"


async def test_bad_counts_and_too_many_viewers():
    async with gateway() as g:
        for given in ("-1", "x", "1e3", "1234567"):
            reply = await g.http.get(f"/dashboard/events?count={given}")
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "count"), given
        g.service.show.num_viewers = MAX_VIEWERS
        reply = await g.http.get("/dashboard/events?count=0")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        g.service.show.num_viewers = 0


# What they say.


class Clock:
    """A watch over a gateway that is not asked anything, and a stream that is fed by hand."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.now = watch, 100.0
        watch._looked = self.now

    def stream(self, **known: Any) -> RequestRecord:
        record = RequestRecord(arrived=self.now, identified=True, **known)
        self.watch.begin(record)
        return record

    def give(self, record: RequestRecord, count: int, at: float) -> None:
        if not record.first:
            record.first, record.num_first = at, count
        record.num_come += count
        record.last = at

    def end(self, record: RequestRecord, finish: str, at: float) -> None:
        record.finish, record.finished = finish, at
        self.watch.finish(record)

    def look(self, seconds: float = 1.0) -> dict[str, Any]:
        self.now += seconds
        return self.watch.look(now=self.now)


async def test_a_streams_rate_is_what_came_since_the_last_look():
    async with gateway() as g:
        clock = Clock(g.service.watch)
        record = clock.stream(id="a", tps_floor=12.0)
        assert clock.look()["streams"][0]["tps"] is None
        clock.give(record, 3, clock.now + 0.5)  # the first three: half a second before the look
        clock.give(record, 6, 0)
        (stream,) = clock.look()["streams"]
        assert (stream["tps"], stream["state"], stream["output"]) == (12.0, "streaming", 9)
        assert (stream["first_s"], stream["below"]) == (1.5, False)
        for tokens, below in ((12, False), (11, True), (11.5, False), (0, True)):
            record.num_come += tokens
            (stream,) = clock.look()["streams"]
            assert (stream["tps"], stream["below"]) == (tokens, below)
        record.num_come += 30
        (stream,) = clock.look(2.5)["streams"]
        assert (stream["tps"], stream["floor"]) == (12.0, 12.0)
        g.service.watch.finish(record)
        assert clock.look()["streams"] == []


async def test_a_stream_that_has_just_begun_has_no_rate_and_loses_no_token():
    async with gateway() as g:
        clock = Clock(g.service.watch)
        record = clock.stream(id="a")
        clock.give(record, 1, clock.now + 0.9)
        assert clock.look()["streams"][0]["tps"] is None
        record.num_come += 11
        assert clock.look()["streams"][0]["tps"] == 10.0  # 11 tokens in 1.1 s


async def test_floors_are_the_requests_own_or_the_servers():
    async with gateway() as g:
        watch = g.service.watch
        watch.streams.default_floor = 20.0
        clock = Clock(watch)
        for name, floor in (("own", 5.0), ("default", None), ("best effort", 0.0)):
            record = clock.stream(id=name, tps_floor=floor)
            clock.give(record, 1, clock.now)
            record.num_come += 9
        found = clock.look()
        floors = {s["id"]: (s["floor"], s["below"]) for s in found["streams"]}
        assert floors == {
            "own": (5.0, False),
            "default": (20.0, True),
            "best effort": (None, False),
        }
        told = second(found)
        assert (told["streams"], told["floored"], told["below"]) == (3, 2, 1)
        assert (told["lowest"], told["middle"]) == (10.0, 10.0)
        assert g.service.metrics.streams == {"held": 1.0, "missed": 1.0, "none": 1.0}


async def test_seconds_of_streams_are_those_that_passed():
    async with gateway() as g:
        counted = g.service.metrics.streams
        clock = Clock(g.service.watch)
        held, missed, free = (clock.stream(id=str(f), tps_floor=f) for f in (5.0, 50.0, 0.0))
        for record in (held, missed, free):
            clock.give(record, 1, clock.now + 0.25)
            record.num_come += 20
        assert second(clock.look(2.25))["held_s"] == 0.0  # nobody had looked before
        assert counted == {"held": 2.0, "missed": 2.0, "none": 2.0}
        for record in (held, missed, free):
            record.num_come += 400
        told = second(clock.look(40.0))  # nobody has looked for a while
        assert (told["held_s"], told["missed_s"], told["below"]) == (40.0, 40.0, 1)
        assert counted == {"held": 42.0, "missed": 42.0, "none": 42.0}


async def test_no_second_of_a_stream_is_lost_between_looks():
    async with gateway() as g:
        counted = g.service.metrics.streams
        clock = Clock(g.service.watch)
        short = clock.stream(id="short", tps_floor=8.0)  # begins and ends unseen
        clock.give(short, 1, 100.125)
        clock.give(short, 4, 100.625)
        clock.end(short, "stop", 100.75)
        assert counted == {"held": 0.5, "missed": 0.0, "none": 0.0}
        late = clock.stream(id="late", tps_floor=8.0)  # too young at the first look, seen at one
        clock.give(late, 1, 100.875)
        clock.look()
        clock.give(late, 9, 101.875)
        clock.look()
        assert counted["held"] == 0.5 + 1.125
        clock.give(late, 2, 102.25)
        clock.end(late, "length", 102.5)
        assert counted == {"held": 0.5 + 1.375, "missed": 0.0, "none": 0.0}
        stalled = clock.stream(id="stalled", tps_floor=8.0)  # its client has had enough of it
        clock.give(stalled, 1, 102.0)
        clock.end(stalled, "abort", 102.75)
        assert counted["missed"] == 0.75
        unborn = clock.stream(id="unborn", tps_floor=8.0)
        clock.end(unborn, "abort", 110.0)
        after = clock.stream(
            id="after", tps_floor=8.0
        )  # a look comes between its last token and its end
        clock.give(after, 9, 102.0)
        clock.look()
        clock.end(after, "stop", 103.5)
        assert sum(counted.values()) == 0.5 + 1.375 + 0.75 + 1.0


async def test_seconds_of_streams_never_fall_and_are_of_all_gateways():
    async with gateway() as g:
        clock = Clock(g.service.watch)
        record, texts = clock.stream(id="a", tps_floor=3.0), []
        clock.give(record, 1, clock.now)
        for i in range(60):
            record.num_come += i % 7
            clock.look(1.1 + i / 7)
            texts.append(dict(g.service.metrics.streams))
        for before, after in itertools.pairwise(texts):
            assert all(after[word] >= before[word] for word in after)
        mine = dict(g.service.metrics.streams)
        total = g.service.metrics.with_others([g.service.metrics.counted()] * 2)
        assert total.streams == {word: 3 * seconds for word, seconds in mine.items()}
        assert g.service.metrics.streams == mine
        text = exposition(total).decode()
        for word, seconds in total.streams.items():
            name = f'tokenspeed:stream_seconds_total{{floor="{word}",model_name="null"}}'
            assert f"{name} {seconds}" in text


async def test_every_token_of_an_answer_is_output():
    async with gateway() as g:
        g.service.watch.look()
        for count in (1, 1, 5):
            assert (await g.post(TEXT, {"prompt": "hi", "max_tokens": count})).status_code == 200
        assert second(g.service.watch.look())["output"] == 7
        assert second(g.service.watch.look())["output"] == 0
        other = g.service.watch.own(1.0) | {"output": 100}
        assert second(g.service.watch.look([other]))["output"] == 100
        assert second(g.service.watch.look())["output"] == 0  # it did not answer this time
        assert second(g.service.watch.look([other | {"output": 103}]))["output"] == 3


async def test_steps_are_told_as_differences():
    async with gateway() as g:
        engine = g.service.metrics.engines[0]
        clock = Clock(g.service.watch)
        drafters = [m.DrafterStats("suffix", 4, 8, 6)]
        before = m.EngineStats(
            num_steps=100,
            busy_s=4.0,
            num_prefill_tokens=1000,
            num_decode_tokens=800,
            num_draft_tokens=8,
            prefix_queries=2000,
            prefix_hits=1000,
            speculation=m.SpeculationStats(drafters, [1]),
            step_times=m.StepTimeStats(10, 0.5, 0.4),
        )
        engine.stats = before
        assert second(clock.look())["decode"] == 0  # what was before anybody looked
        more = [m.DrafterStats("suffix", 6, 12, 9)]
        engine.stats = replace(
            before,
            num_running=3,
            num_waiting=2,
            kv_cache_usage=0.25,
            num_cached_pages=1 << 14,
            num_steps=120,
            busy_s=4.75,
            num_prefill_tokens=1512,
            num_decode_tokens=860,
            num_draft_tokens=12,
            prefix_queries=3000,
            prefix_hits=1900,
            num_preemptions=1,
            speculation=m.SpeculationStats(more, [1]),
            step_times=m.StepTimeStats(15, 0.75, 0.6, 0.125),
        )
        g.service.metrics.rejections["full"] += 2
        told = clock.look()
        expected = {
            "prefill": 512,
            "decode": 60,
            "drafted": 4,
            "accepted": 3,
            "steps": 20,
            "busy_s": 0.75,
            "foretold": 5,
            "predicted_s": 0.25,
            "measured_s": 0.2,
            "error": 0.125,
            "running": 3,
            "waiting": 2,
            "held": 0.25,
            "idle": 0.25,
            "queries": 1000,
            "hits": 900,
            "refused": 2,
            "retracted": 1,
            "lowest": None,
        }
        assert second(told) | expected == second(told)
        assert told["refused"] == {"full": 2}
        assert told["drafters"] == [{"name": "suffix", "drafts": 6, "drafted": 12, "accepted": 9}]


async def test_a_real_request_is_seen_from_its_arrival_to_its_end():
    async with gateway() as g:
        g.client.paused = True
        body = {"prompt": "hello world", "max_tokens": 40}
        headers = {"x-session-id": "<b>one</b>", "user-agent": "agent/1.0"}
        asked = asyncio.create_task(g.post(TEXT, body, headers=headers))
        while not g.clients[0]._open:
            await asyncio.sleep(0)
        (stream,) = g.service.watch.look()["streams"]
        assert (stream["state"], stream["tps"], stream["output"]) == ("prefill", None, 0)
        assert stream["prompt"] > 0
        assert (stream["client"], stream["route"]) == ("agent", "completions")
        assert stream["session"].startswith("h:")  # no name that could be markup
        (session,) = g.service.watch.look()["sessions"]
        assert (session["held"], session["context"]) == (0, 0)  # not a token of it is known
        g.client.paused = False
        while not g.service.watch.look()["streams"][0]["output"]:
            await asyncio.sleep(0)
        assert (await asked).json()["usage"]["completion_tokens"] == 40
        found = g.service.watch.look()
        assert found["streams"] == []
        (session,) = found["sessions"]
        assert (session["turns"], session["running"], session["held"]) == (1, 0, 0)
        assert session["context"] == stream["prompt"] + 40


async def test_what_sessions_hold_is_what_their_requests_have():
    async with gateway() as g:
        clock = Clock(g.service.watch)
        for tokens in (100, 50):
            record = clock.stream(id="a", session="s", num_prompt=tokens)
            g.service.sessions.begin(record)
            clock.give(record, 3, clock.now)
        waits = clock.stream(id="b", session="t", num_prompt=1000)
        g.service.sessions.begin(waits)
        found = {one["session"]: one["held"] for one in clock.look()["sessions"]}
        assert found == {"s": 156, "t": 0}


async def test_the_other_gateways_streams_are_shown_with_ours():
    async with gateway() as g:
        other = g.service.watch.own(1.0)
        stream = {"id": "far", "tps": 3.0, "floor": 5.0, "below": True, "age_s": 2.0}
        other |= {"streams": [stream], "refused": {"full": 4}}
        found = g.service.watch.look([other])
        assert found["streams"] == [stream]
        assert found["refused"] == {"full": 4}
        assert second(found)["below"] == 1


@pytest.mark.parametrize("count", [400])
async def test_of_many_streams_the_worst_off_are_shown(count):
    async with gateway() as g:
        clock = Clock(g.service.watch)
        records = [clock.stream(id=str(i), tps_floor=100.0) for i in range(count)]
        for i, record in enumerate(records):
            clock.give(record, 1, clock.now)
            record.num_come += i
        found = clock.look()
        assert found["num_streams"] == count
        assert sorted(int(s["id"]) for s in found["streams"]) == list(range(256))


@pytest.mark.full
async def test_one_page_for_several_gateways_and_it_ends_with_the_server():
    with server("--num-gateways", "2", "--step-s", "0.02", "--api-key", "k") as s:
        limits = httpx.Limits(max_keepalive_connections=0)  # any gateway may take each
        async with httpx.AsyncClient(
            headers={"x-api-key": "k"}, trust_env=False, limits=limits, timeout=30
        ) as http:
            body = {"prompt": "hello", "max_tokens": 3000}
            tasks = [
                asyncio.create_task(
                    http.post(s.url + TEXT, json=body, headers={"x-session-id": f"agent-{i}"})
                )
                for i in range(8)
            ]
            wanted = {f"agent-{i}" for i in range(8)}
            rates: list[float] = []
            for _ in range(8):  # a machine may take its time to begin
                reply = await http.get(f"{s.url}/dashboard/events?count=2")
                told = parsed(reply.text)[-1][1]
                rates = [stream["tps"] for stream in told["streams"] if stream["tps"]]
                if len(rates) == len(wanted):
                    break
            assert len(rates) == len(wanted)
            assert {stream["session"] for stream in told["streams"]} == wanted
            assert {one["session"] for one in told["sessions"]} == wanted
            for task in tasks:
                task.cancel()
            async with http.stream("GET", f"{s.url}/dashboard/events") as watching:
                lines = watching.aiter_lines()
                assert await anext(lines) == "event: history"
                s.process.terminate()
                assert [line async for line in lines][-1] == ""  # whole, and over
            assert s.process.wait(10) == 0
