# SPDX-License-Identifier: MIT
"""One HTML file with everything in it: tables and pictures, light and dark, no address to load.

Escapes what it is given, but for pictures. Knows no records and draws nothing.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template


@dataclass(frozen=True)
class Table:
    """Rows of texts; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An `<svg>` element, trusted as it is; `ValueError` for anything else.

    `folded`: shown when its title is clicked, for one of many of a kind.
    """

    title: str
    svg: str
    caption: str = ""
    folded: bool = False

    def __post_init__(self) -> None:
        if not self.svg.startswith("<svg "):
            raise ValueError(f"{self.title}: not an <svg> element")


@dataclass(frozen=True)
class Warnings:
    """What a reader must know before believing a figure."""

    lines: Sequence[str]


Part = Table | Picture | Warnings


def page(title: str, lead: str, facts: Mapping[str, str], parts: Sequence[Part]) -> str:
    """The whole document. `facts` are the circumstances: machine, workload, command, raw data."""
    body = [_facts(facts), *map(_part, parts)]
    template = Template(files("tokenspeed.bench").joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        title=html.escape(title), lead=html.escape(lead), body="\n".join(body)
    )


def _part(part: Part) -> str:
    if isinstance(part, Table):
        return _table(part)
    return _picture(part) if isinstance(part, Picture) else _warnings(part)


def _facts(facts: Mapping[str, str]) -> str:
    inside = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>\n"
        for name, value in facts.items()
    )
    return f'<dl class="facts">\n{inside}</dl>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="soft">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}"
    )


def _picture(picture: Picture) -> str:
    name, caption = html.escape(picture.title), html.escape(picture.caption)
    svg = picture.svg.replace("<svg ", f'<svg aria-label="{name}" ', 1)
    figure = f"<figure>\n{svg}\n<figcaption>{caption}</figcaption></figure>"
    if picture.folded:
        return f"<details><summary>{name}</summary>\n{figure}</details>"
    return f"<h2>{name}</h2>\n{figure}"


def _warnings(warnings: Warnings) -> str:
    return "\n".join(f'<p class="warn">{html.escape(line)}</p>' for line in warnings.lines)
