# SPDX-License-Identifier: MIT
"""Pictures and the page: each number where its axis says, and nothing loaded from anywhere."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tokenspeed.bench import plots
from tokenspeed.bench.html import Picture, Table, Warnings, page
from tokenspeed.bench.plots import Cloud, Curve, Point, Timeline, pareto, timeline, ttft
from tokenspeed.bench.records import RequestRecord, Run
from tokenspeed.bench.series import cloud_of, timeline_of

pytest.importorskip("matplotlib")

CURVE = Curve("ours", (Point("1", 200.0, 12_000.0), Point("8", 90.0, 43_200.0)))


def record(sent: float, times: list[float], **given: object) -> RequestRecord:
    """An answer whose events arrived at `times`, one token each."""
    values: dict[str, object] = {
        "session_id": "s",
        "turn": 0,
        "endpoint": "ours",
        "dialect": "chat",
        "kind": "user",
        "asked_output_tokens": len(times),
        "sent_s": sent,
        "first_token_s": times[0] if times else None,
        "end_s": times[-1] if times else sent,
        "output_tokens": len(times),
        "token_times": times,
        "token_counts": [1] * len(times),
    }
    return RequestRecord(**(values | given))  # type: ignore[arg-type]


def run_of(*records: RequestRecord, duration: float = 4.0) -> Run:
    return Run(
        endpoint="ours",
        base_url="http://localhost",
        model="m",
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=duration,
        workload="w",
        seed=0,
        scale=1.0,
        dialect="chat",
        concurrency=2,
        records=list(records),
    )


def marks(svg: str) -> list[tuple[float, float]]:
    """Where a line's markers stand, in the picture's units."""
    uses = re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: var', svg)
    return [(float(x), float(y)) for x, y in uses]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def upright(svg: str) -> list[str]:
    """What is written along y axes."""
    return re.findall(r"<text[^>]*rotate\(-90[^>]*>([^<]*)</text>", svg)


def test_the_faster_user_is_right_and_the_busier_device_is_up() -> None:
    svg = pareto([CURVE], floor=70.0)
    (alone, crowd) = marks(svg)[-2:]
    assert alone[0] > crowd[0]  # 200 TPS right of 90
    assert alone[1] > crowd[1]  # an SVG's y grows downwards: 43,200 above 12,000
    zero = re.findall(r'<text[^>]*x="([\d.]+)"[^>]*>0</text>', svg) or re.findall(
        r"translate\(([\d.]+) [\d.]+\)[^>]*>0</text>", svg
    )
    assert zero, "the axes begin at 0"
    words = texts(svg)
    assert "tokens per second that each user sees (median stream)" in words
    assert upright(svg) == ["output tokens per minute and device"]
    assert {"ours", "floor 70", "1", "8"} <= set(words)


def test_more_uncached_tokens_are_right_and_a_later_first_token_is_up() -> None:
    svg = ttft([Cloud("ours", (10, 10_000), (8.0, 0.1))])  # exchanged axes would exchange them
    dots = re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: var', svg)
    (few_x, few_y), (many_x, many_y) = [(float(x), float(y)) for x, y in dots[:2]]
    assert many_x > few_x
    assert many_y > few_y
    assert upright(svg) == ["seconds to the first token; line: median"]
    assert {"ours", "10", "1,000", "10,000", "1"} <= set(texts(svg))


def test_a_timeline_names_every_line() -> None:
    shown = Timeline([0, 1, 2], [1, 2, 2], [0, 1, 0], [50, 90, 80], [40, 30, 35], [45, 45, 44])
    words = texts(timeline(shown, floor=38.0))
    assert {"streaming", "waiting", "all streams", "median", "slowest", "floor 38"} <= set(words)
    assert not any("unanswered" in word for word in words)
    refused = Timeline([0, 1], [1, 1], [0, 0], [9, 9], [9, 9], [9, 9], refused_s=[0.5, 0.6])
    assert "| 2 unanswered" in texts(timeline(refused, floor=None))


def test_empty_runs_are_pictures_too() -> None:
    for svg in (pareto([], floor=None), ttft([Cloud("none", (), ())])):
        assert svg.startswith("<svg ")
    assert timeline(timeline_of(run_of(duration=0.0)), floor=None).startswith("<svg ")


def test_colours_follow_the_page() -> None:
    svg = pareto([CURVE], floor=70.0)
    bare = re.sub(r"var\(--[\w-]+, #\w{6}\)", "", svg)
    assert re.findall(r"#[0-9a-f]{6}\b", bare) == []
    assert "var(--series-1, #1f6fc4)" in svg


def test_as_many_endpoints_as_there_are_are_drawn() -> None:
    curves = [
        Curve(f"e{i}", (Point("1", 9.0 + i, 9.0), Point("2", 7.0, 12.0 + i))) for i in range(25)
    ]
    svg = pareto(curves, floor=None)
    assert {f"e{i}" for i in range(25)} <= set(texts(svg))
    strokes = re.findall(r'<path d="[^"]*" clip-path[^>]*style="([^"]*series[^"]*)"', svg)
    assert len(strokes) == 25
    assert len(set(strokes)) == 24  # 6 colours in 4 shapes; then they come again
    clouds = [Cloud(f"e{i}", (10, 99), (0.1, 0.2)) for i in range(7)]
    assert {f"e{i}" for i in range(7)} <= set(texts(ttft(clouds)))


def test_two_pictures_share_no_id() -> None:
    every = [
        pareto([CURVE], floor=None),
        ttft([Cloud("ours", (10, 99), (0.1, 0.2))]),
        timeline(timeline_of(run_of(record(0, [1, 2]))), floor=None, ident="timeline-1"),
    ]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in every]
    assert all(ids)
    assert sum(len(one) for one in ids) == len(set.union(*ids))
    for svg, own in zip(every, ids, strict=True):
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert used <= own


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install tokenspeed\[plot\]"):
        pareto([CURVE], floor=None)


class _Addresses(HTMLParser):
    """What a browser would fetch, and the tags that are open at the end."""

    _LOADS = frozenset(
        "src href xlink:href srcset data poster action background formaction manifest".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in self._LOADS and not (value or "").startswith(("#", "data:")):
                self.found.append(f"{tag} {name}={value}")
            if name == "style":
                self.handle_data(value or "")

    def handle_data(self, data: str) -> None:
        self.found += re.findall(r"@import[^;]*|url\((?!#|['\"]?data:)[^)]*\)", data)


def whole_page() -> str:
    parts = [
        Warnings(["ours: ended <early>"]),
        Table("Figures", ("", "ours & theirs"), [("TTFT, s", "0.5")], note="a < b"),
        Picture("Pareto", pareto([CURVE], floor=70.0), "up is better"),
        Picture("TTFT", ttft([Cloud("ours", (10, 99), (0.1, 0.2))])),
        Picture("Over time", timeline(timeline_of(run_of(record(0, [1, 2]))), floor=None)),
    ]
    return page("A run <b>", "two & three", {"machine": "<here>"}, parts)


def test_the_page_loads_nothing() -> None:
    text = whole_page()
    parser = _Addresses()
    parser.feed(text)
    assert parser.found == []
    assert "default-src 'none'" in text
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(parser.tags)
    assert parser.tags.count("svg") == 3


@pytest.mark.parametrize(
    "bad",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        "<style>@import 'https://x.example/a.css';</style>",
        '<p style="background: url(https://x.example/a.png)">',
        '<img src="//x.example/a.png">',
    ],
)
def test_the_check_itself_finds_addresses(bad: str) -> None:
    parser = _Addresses()
    parser.feed(bad)
    assert parser.found


def test_the_page_escapes_and_follows_the_scheme() -> None:
    text = whole_page()
    assert "<title>A run &lt;b&gt;</title>" in text
    assert "&lt;here&gt;" in text
    assert "ended &lt;early&gt;" in text
    assert "ours &amp; theirs" in text
    assert "prefers-color-scheme: dark" in text
    for name in plots.VARIABLES.values():
        light, _, dark = text.partition("prefers-color-scheme: dark")
        assert f"--{name}:" in light, name
        assert f"--{name}:" in dark, name
    with pytest.raises(ValueError, match="not an <svg>"):
        Picture("x", "<p>no</p>")


def test_a_timeline_of_known_events() -> None:
    steady = record(0.0, [0.5 + 0.1 * i for i in range(31)])  # 10 TPS from 0.5 to 3.5
    slow = record(1.0, [1.5, 2.0, 2.5, 3.0])  # 2 TPS
    refused = record(2.0, [], status="refused", end_s=2.05, http_status=503)
    shown = timeline_of(run_of(steady, slow, refused))
    at = {round(t, 6): i for i, t in enumerate(shown.time_s)}
    assert shown.time_s[-1] == pytest.approx(4.0)
    assert [shown.running[at[t]] for t in (0.4, 1.0, 2.0, 3.3, 3.9)] == [0, 1, 2, 1, 0]
    assert [shown.waiting[at[t]] for t in (0.2, 1.2, 2.0, 3.0)] == [1, 1, 1, 0]
    assert np.isnan(shown.lowest_tps[at[1.2]])  # no whole window yet
    assert shown.lowest_tps[at[2.0]] == pytest.approx(10.0)
    assert shown.lowest_tps[at[2.7]] == pytest.approx(2.0)
    assert shown.median_tps[at[2.7]] == pytest.approx(6.0)
    assert shown.tokens_per_s[at[2.7]] == pytest.approx(12.0)
    assert shown.refused_s == [2.05]


def test_a_short_stream_has_one_speed() -> None:
    shown = timeline_of(run_of(record(0.0, [1.0, 1.1, 1.2, 1.3, 1.4])))
    known = [rate for rate in shown.lowest_tps if not np.isnan(rate)]
    assert known == pytest.approx([10.0] * 5)


def test_a_stream_between_two_moments_is_not_seen() -> None:
    shown = timeline_of(run_of(record(0.0, [1.02, 1.04])))
    assert np.isnan(shown.lowest_tps).all()
    assert sum(shown.tokens_per_s) == pytest.approx(2 * 10)  # in ten windows that overlap


def test_a_long_run_is_thinned() -> None:
    shown = timeline_of(run_of(record(0.0, [1.0, 9_000.0]), duration=9_000.0))
    assert len(shown.time_s) <= 601


def test_a_cloud_holds_what_was_computed() -> None:
    cold = record(1.0, [3.0, 3.1], input_tokens=500)
    warm = record(1.0, [1.2, 1.3], input_tokens=500, cached_tokens=480)
    assert cloud_of(run_of(cold, warm, record(0.0, [], status="error"))) == Cloud(
        "ours", (500, 20), (2.0, pytest.approx(0.2))
    )


def test_a_window_that_begins_with_the_first_token_is_whole() -> None:
    """In a run of 228 s moments are 0.38 s apart; as floats, 0.14 + 1 is above the third."""
    shown = timeline_of(run_of(record(0, [0.14 + 0.1 * i for i in range(40)]), duration=228.0))
    assert shown.time_s[3] == 1.14
    assert shown.lowest_tps[3] == pytest.approx(10.0)
