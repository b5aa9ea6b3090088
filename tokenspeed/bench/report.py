# SPDX-License-Identifier: MIT
"""Runs as a person reads them: tables of text, one JSON line, and the page of tables and pictures.

Knows what each figure is called and its unit. Sends nothing and measures nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenspeed.bench import plots
from tokenspeed.bench.html import Part, Picture, Table, Warnings, page
from tokenspeed.bench.measure import FloorResult, Percentiles, Rates, Summary
from tokenspeed.bench.plots import Cloud, Curve, Point
from tokenspeed.bench.records import Run
from tokenspeed.bench.series import cloud_of, timeline_of

UNFOLDED = 2  # timelines that are open at once
NONE = "–"


def load_of(one: Summary | Run) -> str:
    """The load as a word: streams at once, or sessions that begin in a second, if not all do."""
    if one.concurrency is not None:
        return str(one.concurrency)
    return "all at once" if one.rate is None else f"{one.rate:.3g}/s"


def label(one: Summary | Run) -> str:
    """A run's name beside others."""
    return f"{one.endpoint}, {load_of(one)}{' at once' if one.concurrency is not None else ''}"


def number(value: float | None, scale: float = 1.0) -> str:
    """Three digits at least, and no more than are of use."""
    if value is None:
        return NONE
    value *= scale
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}%"


def summary_table(summaries: Sequence[Summary]) -> Table:
    """A row a figure, a column a run."""
    rows = [(name, *map(of, summaries)) for name, of in _ROWS]
    for place, floor in enumerate(summaries[0].floors if summaries else ()):
        for name, of in _FLOOR_ROWS:
            cells = (of(each.floors[place]) for each in summaries)
            rows.append((f"floor {floor.floor:g}: {name}", *cells))
    kept = [row for row in rows if any(cell != NONE for cell in row[1:])]
    return Table("Figures", ("", *map(label, summaries)), kept)


def overview_table(summaries: Sequence[Summary]) -> Table:
    """A row a run, with the figures that decide; for more runs than stand beside one another."""
    floors = [floor.floor for floor in summaries[0].floors] if summaries else []
    header = [
        "", "TPS p50", "in 1 s p1", "output/min", "all/min", "TTFT p50, ms", "p99", "hits",
        "unanswered", "hung up"
    ]  # fmt: skip
    rows = []
    for each in summaries:
        ttft, tps, window = each.ttft_s, each.stream_tps, each.window_tps
        typical, slowest = (None, None) if ttft is None else (ttft.p50, ttft.p99)
        cells = [
            number(None if tps is None else tps.p50),
            number(None if window is None else window.p1),
            number(each.output_tokens_per_minute),
            number(each.total_tokens_per_minute),
            number(typical, 1e3),
            number(slowest, 1e3),
            share(each.hit_rate),
            number(each.turns.unanswered),
            number(each.turns.hung_up),
        ]
        rows.append((label(each), *cells, *map(_attained, each.floors)))
    header += [f"at {floor:g} TPS" for floor in floors]
    note = "Tokens are of one device. Turns: without an answer, and left by the client amid it."
    note += " The last columns are shares of stream-seconds." if floors else ""
    return Table("Runs", tuple(header), rows, note)


def ttft_table(summaries: Sequence[Summary]) -> Table:
    """Seconds to the first token for each class of uncached prompt tokens."""
    classes = sorted({(c.least, c.below) for s in summaries for c in s.ttft_by_uncached})
    rows = []
    for least, below in classes:
        name = f"{least:,} or more" if below is None else f"{least:,} to {below - 1:,}"
        found = [
            next((c.ttft_s for c in s.ttft_by_uncached if c.least == least), None)
            for s in summaries
        ]
        rows.append((name, *(_three(each) for each in found)))
    return Table(
        "Seconds to the first token by uncached prompt tokens, p50 / p90 / p99",
        ("uncached tokens", *map(label, summaries)),
        rows,
    )


def text(table: Table, width: int = 120) -> str:
    """Plain text: the first column, and of the others as many beside one another as fit."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    said, begin = [table.title], 1
    while begin < len(widths):
        end = begin + 1
        while end < len(widths) and sum(widths[begin : end + 1]) + 2 * (end - begin) <= (
            width - widths[0] - 4
        ):
            end += 1
        for line in lines:
            cells = [line[i].rjust(widths[i]) for i in range(begin, end)]
            said.append("  ".join(["", line[0].ljust(widths[0]), *cells]).rstrip())
        said += [""] if end < len(widths) else []
        begin = end
    return "\n".join([*said, *([table.note] if table.note else [])])


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing the figures."""
    said = []
    for run in runs:
        if run.died is not None:
            said.append(f"{label(run)}: the endpoint died after {run.duration_s:.1f} s: {run.died}")
        for status, word in (("error", "failed"), ("refused", "were refused")):
            those = [each for each in run.records if each.status == status]
            if those:
                first = " ".join((those[0].error or "").split())[:200]
                said.append(f"{label(run)}: {len(those)} of {len(run.records)} {word}: {first}")
        if any(each.status == "ok" for each in run.records) and all(
            each.cached_tokens is None for each in run.records
        ):
            said.append(f"{label(run)}: does not tell cached tokens; all count as computed")
        untold = [
            each for each in run.records if each.output_tokens and each.computed_tokens is None
        ]
        if untold:
            said.append(
                f"{label(run)}: {len(untold)} of {len(run.records)} ended before it was told what"
                " of their prompts was cached; these prompts are left out"
            )
    return said


def json_line(command: str, summaries: Sequence[Summary], facts: Mapping[str, Any]) -> str:
    """What stands in the tables, for programs."""
    runs = [each.to_json() for each in summaries]
    return json.dumps({"benchmark": command, **facts, "runs": runs}, allow_nan=False)


def curves_of(summaries: Sequence[Summary], y: Callable[[Summary], float]) -> list[Curve]:
    """A frontier for each endpoint: its runs in which a stream had a speed, by their load."""
    names = dict.fromkeys(each.endpoint for each in summaries)
    ordered = sorted(summaries, key=lambda each: each.concurrency or 0)
    return [
        Curve(
            name,
            tuple(
                Point(load_of(each), each.stream_tps.p50, y(each))
                for each in ordered
                if each.endpoint == name and each.stream_tps is not None
            ),
        )
        for name in names
    ]


def tables(summaries: Sequence[Summary]) -> list[Table]:
    """What is to be read first."""
    if len(summaries) > 1:
        return [overview_table(summaries)]
    return [summary_table(summaries), ttft_table(summaries)]


def html_report(
    title: str,
    runs: Sequence[Run],
    summaries: Sequence[Summary],
    facts: Mapping[str, str],
    floor: float | None,
) -> str:
    """The page. Raises `PlotsNeedMatplotlibError`."""
    parts: list[Part] = [Warnings(warnings(runs)), *tables(summaries)]
    if len(summaries) > 1:
        parts += _frontiers(summaries, floor)
        parts += [summary_table(summaries)]
        parts += [ttft_table(summaries)]
    parts += [_first_tokens(runs), *_timelines(runs, floor)]
    lead = f"{summaries[0].workload} on {summaries[0].model}" if summaries else ""
    return page(title, lead, facts, parts)


def _frontiers(summaries: Sequence[Summary], floor: float | None) -> list[Part]:
    caption = "Up and right is better. The number at a point is its load: streams at once."
    if any(each.concurrency is None for each in summaries):
        caption = "Up and right is better. The words at a point are its load."
    output = curves_of(summaries, lambda each: each.output_tokens_per_minute)
    total = curves_of(summaries, lambda each: each.total_tokens_per_minute)
    all_tokens = plots.pareto(total, floor=floor, what="prompt and output tokens", ident="total")
    return [
        Picture("Speed of a user against output of a device", plots.pareto(output, floor=floor),
                caption),
        Picture("The same, prompt tokens counted too", all_tokens,
                "Cached prompt tokens count like computed ones."),
    ]  # fmt: skip


def _first_tokens(runs: Sequence[Run]) -> Part:
    """One cloud an endpoint: of all of its loads together."""
    clouds: dict[str, Cloud] = {}
    for run in runs:
        new, old = cloud_of(run), clouds.get(run.endpoint)
        clouds[run.endpoint] = new if old is None else old.joined(new)
    return Picture(
        "Time to the first token against what had to be computed",
        plots.ttft(list(clouds.values())),
        f"One dot a request, at most {plots.MOST_DOTS:,} of an endpoint; all loads together.",
    )


def _timelines(runs: Sequence[Run], floor: float | None) -> list[Part]:
    return [
        Picture(
            f"Over time: {label(run)}",
            plots.timeline(timeline_of(run), floor=floor, ident=f"timeline-{place}"),
            "Marks on the uppermost axis are requests that were refused or failed.",
            folded=len(runs) > UNFOLDED,
        )
        for place, run in enumerate(runs)
    ]


def _three(found: Percentiles | None, scale: float = 1.0) -> str:
    if found is None:
        return NONE
    return " / ".join(number(each, scale) for each in (found.p50, found.p90, found.p99))


def _rates(found: Rates | None) -> str:
    if found is None:
        return NONE
    return " / ".join(number(each) for each in (found.p50, found.p10, found.p1))


def _attained(floor: FloorResult) -> str:
    return share(floor.attainment if floor.num_streams else None)


def _sent(each: Summary) -> str:
    planned = "" if each.turns.planned is None else f" of {number(each.turns.planned)}"
    return f"{number(each.turns.sent)}{planned}"


def _unanswered(each: Summary) -> str:
    found = each.turns
    kinds = {"refused": found.refused, "failed": found.failed, "cut off": found.cut_off}
    those = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f"{found.unanswered}: {those}" if those else "0"


def _untold(each: Summary) -> str:
    if not each.untold_requests:
        return NONE
    return f"{number(each.untold_input_tokens)} in {each.untold_requests} requests"


def _refused(each: Summary) -> str:
    found = each.refusals
    if not found.count:
        return "0"
    return f"{found.count} ({share(found.share)}), {found.with_retry_after} with Retry-After"


_ROWS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("sessions", lambda s: number(s.num_sessions)),
    ("turns sent", _sent),
    ("turns without an answer", _unanswered),
    ("requests", lambda s: number(s.num_requests)),
    ("answered", lambda s: number(s.statuses.get("ok", 0))),
    ("refused", _refused),
    ("refused after, ms, p50 / p90 / p99", lambda s: _three(s.refusals.answer_s, 1e3)),
    ("failed", lambda s: number(s.statuses.get("error", 0))),
    ("cancelled", lambda s: number(s.statuses.get("cancelled", 0))),
    ("run, s", lambda s: number(s.duration_s)),
    ("time to first token, ms, p50 / p90 / p99", lambda s: _three(s.ttft_s, 1e3)),
    ("between tokens, ms, p50 / p90 / p99", lambda s: _three(s.inter_token_s, 1e3)),
    ("between events, ms, p50 / p90 / p99", lambda s: _three(s.event_gap_s, 1e3)),
    ("whole request, s, p50 / p90 / p99", lambda s: _three(s.latency_s)),
    ("TPS of a stream, p50 / p10 / p1", lambda s: _rates(s.stream_tps)),
    ("TPS in one second, p50 / p10 / p1", lambda s: _rates(s.window_tps)),
    ("output tokens a minute and device", lambda s: number(s.output_tokens_per_minute)),
    ("computed prompt tokens a minute and device", lambda s: number(s.computed_input_per_minute)),
    ("cached prompt tokens a minute and device", lambda s: number(s.cached_input_per_minute)),
    ("prompt tokens left out", _untold),
    ("all tokens a minute and device", lambda s: number(s.total_tokens_per_minute)),
    ("cache hit rate", lambda s: share(s.hit_rate)),
    ("cost of a session", lambda s: number(s.cost_per_session)),
)
_FLOOR_ROWS: tuple[tuple[str, Callable[[FloorResult], str]], ...] = (
    ("share of stream-seconds", _attained),
    ("streams held at p99", lambda f: f"{f.held_streams} of {f.num_streams}"),
    ("goodput: users held at once", lambda f: number(f.held_users)),
)
