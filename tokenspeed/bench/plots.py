# SPDX-License-Identifier: MIT
"""Pictures of runs as inline SVG whose colours are CSS variables. Needs matplotlib.

Draws the numbers it is given: knows no records, no endpoints and no HTML.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import numpy as np

WIDTH, HEIGHT = 7.4, 4.3  # inches; an SVG scales, so only the ratio and the text's size count
INK, SOFT, GRID, WARN = "#1f2328", "#59636e", "#d8dee4", "#c0392b"
SERIES = ("#1f6fc4", "#c4560c", "#0f8a63", "#7c4dbd", "#a3154f", "#7a6a00")
SHAPES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # of a line and its marks
# What a page may set, and what a bare picture falls back to.
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", WARN: "warn"} | {
    color: f"series-{place}" for place, color in enumerate(SERIES, start=1)
}
LABEL_GAP = 12.0  # points between two names, middle to middle
MOST_DOTS = 2000  # of one endpoint: more only make the page heavy


class PlotsNeedMatplotlibError(ValueError):
    """matplotlib is not installed."""

    def __init__(self) -> None:
        super().__init__("plots need matplotlib: pip install tokenspeed[plot]")


@dataclass(frozen=True)
class Point:
    """One load of a frontier: `streams` at once (or requests per second), and what came of it."""

    load: str
    tps_per_user: float
    tokens_per_minute: float  # of one device


@dataclass(frozen=True)
class Curve:
    """A frontier: points in the order of their load."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Cloud:
    """Requests of one endpoint: tokens that it had to compute, and seconds to its first token."""

    name: str
    uncached_tokens: tuple[int, ...]
    ttft_s: tuple[float, ...]

    def joined(self, other: "Cloud") -> "Cloud":
        """With the requests of another run of the endpoint."""
        tokens = self.uncached_tokens + other.uncached_tokens
        return Cloud(self.name, tokens, self.ttft_s + other.ttft_s)


@dataclass(frozen=True)
class Timeline:
    """A run over time, one value per entry of `time_s`. NaN where no stream was running."""

    time_s: Sequence[float]
    running: Sequence[float]  # streams that have had their first token and not their last
    waiting: Sequence[float]  # requests that wait for their first token
    tokens_per_s: Sequence[float]  # of all streams together
    lowest_tps: Sequence[float]  # of the slowest stream
    median_tps: Sequence[float]
    refused_s: Sequence[float] = ()  # when requests were refused or failed


def pareto(
    curves: Sequence[Curve],
    *,
    floor: float | None,
    what: str = "output tokens",
    ident: str = "pareto",
) -> str:
    """TPS that a user sees (x) against tokens per minute of a device (y); a number is a load."""
    figure = _figure(HEIGHT)
    axes = figure.add_subplot()
    labels = []
    for (color, line, mark), curve in _told_apart(curves):
        x = [point.tps_per_user for point in curve.points]
        y = [point.tokens_per_minute for point in curve.points]
        axes.plot(x, y, line, color=color, marker=mark, markersize=5, linewidth=2)
        for point in curve.points:
            at = (point.tps_per_user, point.tokens_per_minute)
            _text(axes, point.load, at, (3, 7), SOFT, size=8)
        if curve.points:
            right = max(curve.points, key=lambda point: point.tps_per_user)
            labels.append(_Label(right.tps_per_user, right.tokens_per_minute, curve.name, color))
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per second that each user sees (median stream)")
    axes.set_ylabel(f"{what} per minute and device")
    _floor_line(axes, floor, vertical=True)
    return _svg(figure, ident, {axes: labels}, beside=False)


def ttft(clouds: Sequence[Cloud]) -> str:
    """Tokens that had to be computed (x) against seconds to the first token (y), both log."""
    figure = _figure(HEIGHT)
    axes = figure.add_subplot(xscale="log", yscale="log")
    labels = []
    for (color, line, mark), cloud in _told_apart(clouds):
        x = np.maximum(np.asarray(cloud.uncached_tokens, dtype=float), 1.0)
        y = np.asarray(cloud.ttft_s, dtype=float)
        thin = slice(None, None, math.ceil(len(x) / MOST_DOTS) or 1)
        axes.scatter(x[thin], y[thin], s=14, color=color, marker=mark, alpha=0.5, linewidth=0)
        middle = list(_medians(x, y))
        if middle:
            axes.plot(*zip(*middle, strict=True), line, color=color, linewidth=2)
            labels.append(_Label(*middle[-1], cloud.name, color))
    axes.set_xlabel("prompt tokens that were not in the cache (1: none or one)")
    axes.set_ylabel("seconds to the first token; line: median")
    _plain_log(axes)
    return _svg(figure, "ttft", {axes: labels})


def timeline(shown: Timeline, *, floor: float | None, ident: str = "timeline") -> str:
    """Three panels over one time axis: requests, tokens per second, and each stream's speed."""
    figure = _figure(1.45 * HEIGHT)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    time = np.asarray(shown.time_s, dtype=float)
    blue, orange = SERIES[0], SERIES[1]
    speeds = [(shown.median_tps, "median", blue), (shown.lowest_tps, "slowest", orange)]
    counts = [(shown.running, "streaming", blue), (shown.waiting, "waiting", orange)]
    labels = {
        top: _lines(top, time, counts, drawstyle="steps-post"),
        middle: _lines(middle, time, [(shown.tokens_per_s, "all streams", blue)]),
        bottom: _lines(bottom, time, speeds),
    }
    if len(shown.refused_s):
        top.plot(shown.refused_s, np.zeros(len(shown.refused_s)), "|", color=WARN, markersize=9)
        name = f"| {len(shown.refused_s)} unanswered"
        labels[top].append(_Label(time[-1] if len(time) else 0.0, 0.0, name, WARN))
    _floor_line(bottom, floor, vertical=False)
    top.set_ylabel("requests")
    top.yaxis.get_major_locator().set_params(integer=True)
    middle.set_ylabel("tokens per second")
    bottom.set_ylabel("tokens per second\nof one stream")
    bottom.set_xlabel("seconds since the run's start; windows of one second")
    for axes in (top, middle, bottom):
        axes.set_ylim(bottom=0)
    figure.align_ylabels()
    return _svg(figure, ident, labels)


@dataclass(frozen=True)
class _Label:
    """A line's name at its last point, in the axes' data."""

    x: float
    y: float
    name: str
    color: str


def _lines(
    axes: Any,
    time: np.ndarray[Any, Any],
    lines: Sequence[tuple[Sequence[float], str, str]],
    drawstyle: str = "default",
) -> list[_Label]:
    labels = []
    for values, name, color in lines:
        y = np.asarray(values, dtype=float)
        axes.plot(time, y, color=color, linewidth=1.5, drawstyle=drawstyle)
        known = np.flatnonzero(~np.isnan(y))
        if len(known):
            labels.append(_Label(float(time[-1]), float(y[known[-1]]), name, color))
    if len(time):
        axes.set_xlim(time[0], max(time[-1], time[0] + 1e-3))
    return labels


def _figure(height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsNeedMatplotlibError from None
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _told_apart(things: Sequence[Any]) -> Iterator[tuple[tuple[str, str, str], Any]]:
    """Each with a colour, a line and a mark. Colours repeat with another shape; where shapes run
    out too, the name at a line still tells."""
    shapes = product(SHAPES, SERIES)
    looks = ((color, line, mark) for (line, mark), color in cycle(shapes))
    return zip(looks, things, strict=False)


def _medians(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Iterator[tuple[float, float]]:
    """Medians over half decades of x, at the median x of each."""
    bins = np.floor(2 * np.log10(x))
    for each in np.unique(bins):
        inside = bins == each
        yield float(np.median(x[inside])), float(np.median(y[inside]))


def _floor_line(axes: Any, floor: float | None, *, vertical: bool) -> None:
    if floor is None:
        return
    draw = axes.axvline if vertical else axes.axhline
    draw(floor, color=WARN, linestyle=(0, (4, 3)), linewidth=1.2)
    if vertical:
        at, offset, coords = (floor, 1.0), (4, -10), axes.get_xaxis_transform()
    else:
        at, offset, coords = (0.0, floor), (4, 4), axes.get_yaxis_transform()
    _text(axes, f"floor {floor:g}", at, offset, WARN, coords)


def _text(
    axes: Any,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    color: str,
    coords: Any = "data",
    **style: Any,
) -> None:
    """`text` at a place of the axes, moved by `offset` points; may stand outside of them."""
    axes.annotate(
        text,
        at,
        offset,
        xycoords=coords,
        textcoords="offset points",
        color=color,
        annotation_clip=False,
        **{"size": 9, **style},
    )


def _name_lines(axes: Any, labels: Sequence[_Label], *, beside: bool) -> None:
    """Each line's name in its colour, at its end or `beside` the axes; none over another."""
    scale = 72 / axes.figure.dpi
    places = [axes.transData.transform((label.x, label.y)) * scale for label in labels]
    last = -math.inf
    for (_, y), label in sorted(zip(places, labels, strict=True), key=lambda each: each[0][1]):
        shift = max(0.0, last + LABEL_GAP - y)
        last = y + shift
        at, coords = (label.x, label.y), "data"
        if beside:
            at, coords = (1.0, label.y), axes.get_yaxis_transform()
        style = {"va": "center", "fontweight": "bold", "size": 9.5}
        _text(axes, label.name, at, (8, shift), label.color, coords, **style)


def _plain_log(axes: Any) -> None:
    """Whole decades, and ticks as a person writes them: 0.1, 1, 10,000 and not powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
        low, high = axis.get_data_interval()
        if 0 < low <= high < math.inf:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            axis.set_view_interval(10.0**first, 10.0 ** max(last, first + 1), ignore=True)


def _svg(
    figure: Any, ident: str, labels: Mapping[Any, Sequence[_Label]], *, beside: bool = True
) -> str:
    """The figure as an `<svg>` element alone: no prologue, names of its own, colours as variables.

    A page holds several: equal ids in two of them would clip one by the other's axes.
    """
    for axes in figure.axes:
        _style(axes)
    layout = figure.get_layout_engine()
    layout.execute(figure)  # it must stand before names can be kept apart, and then make room
    for axes, named in labels.items():
        _name_lines(axes, named, beside=beside)
    layout.execute(figure)
    figure.set_layout_engine("none")
    buffer = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokenspeed"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{ident}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name}, {color})")
    return text.replace("<svg ", '<svg role="img" ', 1)


def _style(axes: Any) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=SOFT, labelsize=9, length=0, which="both")
    axes.xaxis.label.set(color=INK, size=10)
    axes.yaxis.label.set(color=INK, size=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter("{x:,.10g}")
