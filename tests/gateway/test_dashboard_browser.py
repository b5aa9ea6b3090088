# SPDX-License-Identifier: MIT
"""The page in a real Chromium, before a real server under load: what it shows, keys, themes.

python -m tests.gateway.test_dashboard_browser docs/images    # takes the documents' pictures
"""

import io
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.gateway.browser import MISSING, Browser, browser
from tests.gateway.processes import Server, server

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
WORDS = "the page shows what a server does while it answers many agents at once".split()
FLOOR = 15
AGENTS = {  # session: words of its first prompt, its floor
    "billing-refactor": (900, None),  # the server's
    "docs-agents": (120, None),
    "fix-flaky-tests": (300, 30),
    "migrate-db": (500, None),
    "nightly-report": (600, 0),  # best effort, without one
    "parser-fuzz": (80, 20),
    "release-notes": (400, None),
    "search-index": (700, None),
    "type-hints": (250, None),
    "ui-theme": (200, None),
}
SPECULATION = '{"method": "ngram", "num_speculative_tokens": 3}'
ROWS = "return document.querySelectorAll('#streams .row').length > 3"
DRAWN = """return [...document.querySelectorAll('.strip')].every(strip =>
    [...strip.querySelectorAll('polygon, path')].some(one =>
        (one.getAttribute('points') || one.getAttribute('d')).length > 60))"""
SIZE = (1440, 960)


def talk(url: str, session: str, stop: threading.Event) -> None:
    """An agent: turn after turn, each with what came before and a little more."""
    dice = random.Random(session)
    count, floor = AGENTS[session]
    headers = {"x-session-id": session, "user-agent": "agent/1.0"}
    if floor:
        headers["x-tokenspeed-tps-floor"] = str(floor)
    tier = "flex" if floor == 0 else "default"
    said = [dice.choice(WORDS) for _ in range(count)]
    with httpx.Client(timeout=120, trust_env=False) as http:
        while not stop.is_set():
            prompt = " ".join(said[: count + 600])
            body = {"prompt": prompt, "max_tokens": 600, "stream": True, "ignore_eos": True}
            asked = body | {"temperature": 0.8, "service_tier": tier}
            with http.stream("POST", f"{url}/v1/completions", headers=headers, json=asked) as reply:
                reply.raise_for_status()
                for _ in reply.iter_lines():
                    if stop.is_set():
                        return
            said += [dice.choice(WORDS) for _ in range(40)]


@contextmanager
def loaded() -> Iterator[Server]:
    """The demo model with ten agents, of which eight run."""
    flags = ("--max-num-seqs", "8", "--speculative-config", SPECULATION)
    flags += ("--tps-floor", str(FLOOR))
    stop = threading.Event()
    with server(*flags, real=True) as s:
        agents = [threading.Thread(target=talk, args=(s.url, one, stop)) for one in AGENTS]
        for agent in agents:
            agent.start()
        try:
            yield s
        finally:
            stop.set()
            for agent in agents:
                agent.join()


def picture(b: Browser, scheme: str) -> Image.Image:
    b.look(*SIZE, scheme)
    b.wait("return document.querySelectorAll('#streams .row').length > 5")
    return Image.open(io.BytesIO(b.picture())).convert("RGB")


def luminance(color: str) -> float:
    """Relative luminance of a `rgb(...)` (WCAG 2)."""
    parts = [int(one) / 255 for one in color[4:-1].split(",")[:3]]
    lin = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]


def contrast(b: Browser, selector: str) -> float:
    """Of an element's text before the card that it stands on."""
    found = b.run(
        "const e = document.querySelector(arguments[0]), card = e.closest('.tile, section, body');"
        "return [getComputedStyle(e).color, getComputedStyle(card).backgroundColor]",
        selector,
    )
    high, low = sorted(map(luminance, found), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.timeout(240)
def test_the_page_under_load_in_light_and_dark(tmp_path: Path) -> None:
    with loaded() as s, browser(tmp_path) as b:
        b.look(*SIZE, "light")
        b.open(f"{s.url}/dashboard")
        b.wait(ROWS, 90)
        b.wait("return document.querySelector('#streams .fill').style.width > '0%'")
        b.wait("return document.querySelectorAll('#sessions tr').length >= 6", 60)
        check_loads_nothing(b, s.url)
        check_the_policy_holds(b, s.url)
        check_shows_what_the_server_says(b, s)
        check_keys(b)
        pictures = {scheme: picture(b, scheme) for scheme in ("light", "dark")}
        brightness = {}
        for scheme, found in pictures.items():
            b.look(*SIZE, scheme)
            for selector in ("#model", ".tile b", ".tile span", "#streams .name", "td", ".key em"):
                assert contrast(b, selector) >= 4.5, (scheme, selector)
            assert found.size == SIZE
            assert len(found.getcolors(1 << 24)) > 100  # more than an empty page
            brightness[scheme] = sum(found.convert("L").histogram()[128:])
        assert brightness["light"] > 0.9 * SIZE[0] * SIZE[1]
        assert brightness["dark"] < 0.2 * SIZE[0] * SIZE[1]
        assert b.log() == []  # the policy's refusals would stand here


def check_loads_nothing(b: Browser, url: str) -> None:
    fetched = b.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert f"{url}/dashboard/files/charts.js" in fetched
    others = {one for one in fetched if not one.startswith(f"{url}/dashboard/files/")}
    assert others <= {f"{url}/dashboard/events"}


def check_the_policy_holds(b: Browser, url: str) -> None:
    """Who got a script onto the page could load nothing with it, nor make markup of a text."""
    refused = b.run(
        "return new Promise(done => {"
        " addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        " new Image().src = arguments[0] })",
        f"{url}/picture.png",
    )
    assert refused == "img-src"
    for script in (
        "document.createElement('script').src = '/x.js'",
        "document.body.innerHTML = ''",
    ):
        assert b.run(f"try {{ {script} }} catch (e) {{ return e.name }}") == "TypeError", script
    b.log()  # of these refusals


def check_shows_what_the_server_says(b: Browser, s: Server) -> None:
    text = httpx.get(f"{s.url}/dashboard/events?count=1", trust_env=False).text
    told = json.loads(text.split("event: snapshot\ndata: ")[1])
    assert {one["session"] for one in told["sessions"]} <= set(AGENTS)
    names = b.run("return [...document.querySelectorAll('#streams .name')].map(e => e.textContent)")
    assert set(names) <= set(AGENTS)
    for row in b.run(
        "return [...document.querySelectorAll('#streams .row')].map(r => ["
        " r.querySelector('.far').textContent, r.querySelector('.tps').textContent,"
        " r.classList.contains('below')])"
    ):
        floor, tps, below = row
        assert floor in ("15.0", "20.0", "30.0", "none")
        assert below == tps.startswith("▼")
    b.wait(DRAWN, 60)
    strips = b.run(
        "return [...document.querySelectorAll('.strip svg')].map(e => e.children.length)"
    )
    assert strips == [3, 3, 1, 1, 4, 4, 2, 2, 1, 1]
    assert b.run("return document.querySelector('#kv-note').textContent").startswith("device")
    assert b.run("return document.querySelector('#drafters').textContent").startswith("ngram")
    check_fits(b)


def check_fits(b: Browser) -> None:
    """Nothing on the page lies outside its box."""
    assert b.run("return document.documentElement.scrollWidth <= innerWidth")
    cut = b.run(
        "return [...document.querySelectorAll('.tile b, .tile span, .top *, th, .tps, .far, h2')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 1"
        "  && getComputedStyle(e).display !== 'inline').map(e => e.textContent)"
    )
    assert cut == []
    heads = b.run(
        "return [...document.querySelectorAll('.strip .head')]"
        ".map(e => [e.textContent, e.clientHeight])"
    )
    assert {text for text, height in heads if height > 22} == set()  # on one line


def check_keys(b: Browser) -> None:
    when = "return document.querySelector('#when').textContent"
    assert b.run(when) == "now"
    b.press("ArrowLeft")
    assert b.run(when) != "now"
    assert "TPS of streams" in b.run("return document.querySelector('#say').textContent")
    b.press("\ue00c")  # Escape
    assert b.run(when) == "now"
    b.press("1")
    pressed = "return document.querySelector('[data-span][aria-pressed=true]').dataset.span"
    assert b.run(pressed) == "120"
    b.press("p")
    first = b.run("return document.querySelector('#strips').innerHTML")
    time.sleep(2.5)
    assert b.run("return document.querySelector('#strips').innerHTML") == first
    b.press("p")
    b.press("ArrowDown", "ArrowDown")
    focused = "return document.activeElement.className.split(' ')[0]"
    b.wait(f"return ({focused[7:]}) === 'row'")
    b.press("Enter")
    b.wait("return document.querySelector('.more') !== null", 10)
    b.press("t")
    assert b.run("return document.documentElement.dataset.theme") == "light"
    b.press("t", "t")
    assert b.run("return document.documentElement.dataset.theme") is None


@pytest.mark.timeout(120)
def test_a_key_is_asked_for_and_the_end_is_told(tmp_path: Path) -> None:
    with server("--api-key", "the-key", "--max-num-seqs", "4") as s, browser(tmp_path) as b:
        b.open(f"{s.url}/dashboard")
        b.wait("return document.querySelector('#ask').open")
        b.press(*"wrong", "Enter")
        b.wait("return document.querySelector('#why').textContent.includes('does not know')")
        b.wait("return document.querySelector('#ask').open")
        b.press(*"the-key", "Enter")
        b.wait("return document.querySelector('#state').textContent === 'ready'")
        assert b.run("return document.querySelector('#streams').textContent").startswith("Nobody")
        assert "the-key" not in b.run("return document.documentElement.outerHTML + location.href")
        s.process.terminate()
        s.process.wait(20)
        b.wait("return document.querySelector('#link').textContent.startsWith('no connection')")
        assert b.run("return document.body.classList.contains('gone')")


def take_pictures(folder: Path) -> None:
    """After a minute of load, with two minutes shown."""
    with tempfile.TemporaryDirectory() as own, loaded() as s, browser(Path(own)) as b:
        b.look(*SIZE, "light")
        b.open(f"{s.url}/dashboard")
        b.wait(ROWS, 90)
        b.press("1")
        time.sleep(75)
        for scheme in ("light", "dark"):
            found = picture(b, scheme)
            few_colors(found).save(folder / f"dashboard-{scheme}.png", optimize=True)


def few_colors(found: Image.Image) -> Image.Image:
    """The 256 that most of it has, exactly; of the others, at the edges of letters, the nearest."""
    counts = sorted(found.getcolors(1 << 24), reverse=True)[:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for _, color in counts for part in color])
    return found.quantize(palette=palette, dither=Image.Dither.NONE)


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]))
