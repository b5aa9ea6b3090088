# SPDX-License-Identifier: MIT
"""Tables of text and Markdown, and a plot, from the results' JSON. Measures nothing."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from peers.figures import FIGURES
from peers.summary import OURS

Group = Mapping[str, Any]  # one model with one weight type, as `cpu_peers.py` writes it
ROOF = "roof"


def title(group: Group) -> str:
    return f"{group['model']}, {group['weights']} weights"


def table(group: Group) -> list[list[str]]:
    """Engines down, figures across; the first row has names, the second one units."""
    medians: Mapping[str, Mapping[str, float]] = group["medians"]
    names = [name for name in FIGURES if any(name in found for found in medians.values())]
    rows = [["engine", *(FIGURES[n].title for n in names)], ["", *(FIGURES[n].unit for n in names)]]
    for engine, found in medians.items():
        rows.append([engine, *(_number(name, found.get(name)) for name in names)])
    rows.append([ROOF, *(_number(name, group["roof"].get(name)) for name in names)])
    return rows


def ratios(group: Group) -> list[list[str]]:
    """A row a figure: ours, the best peer's, the ratio beside the aim, the share of the roof."""
    rows = [["figure", OURS, "best peer", "", "ratio", "of single rounds", "aim", "met", "of roof"]]
    for line in group["comparison"]:
        name, (low, high) = line["figure"], line["spread"]
        roof = group["roof"].get(name)
        rows.append(
            [
                FIGURES[name].title,
                _number(name, line["ours"]),
                _number(name, line["best"]),
                line["best_engine"],
                f"{line['ratio']:.2f}",
                f"{low:.2f} to {high:.2f}",
                _aim(name, line["aim"]),
                {None: "", True: "yes", False: "NO"}[line["met"]],
                f"{line['ours'] / roof:.2f}" if roof else "",
            ]
        )
    return rows


def text(rows: list[list[str]]) -> str:
    """Columns of equal width, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]).rstrip())
    return "\n".join(lines)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole of the results as a page."""
    machine, roofs = results["machine"], results["roofs"]
    parts = [
        "# CPU peers",
        f"{machine['cpu']}, {results['threads']} threads, {results['date']};"
        f" `{results['command']}`. Medians of {results['rounds']} interleaved rounds;"
        f" load {machine['load']} at the start.",
        f"Roofs measured in the run: {roofs['read_gb_s']:.1f} GB/s read,"
        f" {roofs['bf16_tflop_s']:.2f} TFLOP/s bf16, {roofs['int8_top_s']:.2f} TOP/s int8.",
    ]
    for group in results["groups"]:
        parts += [f"## {title(group)}", _pipes(table(group)), _pipes(ratios(group))]
        limits = [
            [x["what"], str(x["value"]), str(x["limit"]), "yes" if x["met"] else "NO"]
            for x in group["limits"]
        ]
        parts.append(_pipes([["tokenspeed", "value", "limit", "met"], *limits]))
        parts += [f"Left out: {name}: {why}" for name, why in group["left_out"].items()]
    versions = {
        k: v
        for g in results["groups"]
        for found in g["versions"].values()
        for k, v in found.items()
    }
    parts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + ".")
    return "\n\n".join(parts) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Bars: each figure of each engine over ours, a panel a group; above 1 is better than ours."""
    import matplotlib.pyplot as plt

    groups = results["groups"]
    figure, axes = plt.subplots(len(groups), 1, figsize=(11, 3.2 * len(groups)), squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        _panel(axis, group)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, group: Group) -> None:
    medians = group["medians"]
    ours = medians.get(OURS, {})
    names = [n for n in FIGURES if ours.get(n) and not n.startswith("error")]
    width = 0.8 / max(1, len(medians))
    for place, (engine, found) in enumerate(medians.items()):
        heights = [_better(name, found.get(name), ours[name]) for name in names]
        at = [index + place * width for index in range(len(names))]
        axis.bar(at, heights, width, label=engine, color="black" if engine == OURS else None)
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(names))])
    axis.set_xticklabels([fill(FIGURES[name].title, 18) for name in names], fontsize=7)
    axis.set_ylim(0, 2)
    axis.set_title(f"{title(group)}: speed beside TokenSpeed's (higher is better)", fontsize=9)
    axis.legend(fontsize=7, ncols=4)


def _better(name: str, value: float | None, ours: float) -> float:
    if not value:
        return 0.0
    return value / ours if FIGURES[name].higher_is_better else ours / value


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:,.{FIGURES[name].digits}f}"


def _aim(name: str, aim: float | None) -> str:
    if aim is None:
        return ""
    return f"{'>=' if FIGURES[name].higher_is_better else '<='} {aim}"


def _pipes(rows: list[list[str]]) -> str:
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + " --- |" * len(rows[0])
    return "\n".join([head, rule, *rest])
