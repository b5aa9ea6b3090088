# SPDX-License-Identifier: MIT
"""A table of texts, and how it is printed. Knows nothing of what stands in it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of texts; columns after the first are set flush right if `numbers`."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: bool = True


def render(table: Table) -> str:
    """Plain text: columns padded to their widest cell."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]

    def text(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if table.numbers and at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  " + "  ".join(padded).rstrip()

    rule = "  " + "  ".join("-" * width for width in widths if width)
    head = [text(table.header), rule] if any(table.header) else []
    return "\n".join([table.title, *head, *(text(row) for row in table.rows)])
