"""app/tables.py - pure: plain text tables, whatever stands in their cells."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from sandbox_provisioner.inside.printable import one_line


def table(rows: Sequence[Sequence[str]], *, widest: Sequence[int] = ()) -> str:
    """*rows* in columns, the first row underlined; cells longer than *widest* go on below."""
    limits = [*widest, *[1 << 16] * len(rows[0])]
    cells = [
        [_lines(cell, limit) for cell, limit in zip(row, limits, strict=False)] for row in rows
    ]
    widths = [
        max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)
    ]
    printed = [line for row in cells for line in _printed(row, widths)]
    height = max(len(cell) for cell in cells[0])
    printed.insert(height, "  ".join("─" * width for width in widths))
    return "\n".join(printed)


def _lines(cell: str, limit: int) -> list[str]:
    return textwrap.wrap(one_line(cell), limit) or [""]


def _printed(row: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    return [
        "  ".join(
            (cell[number] if number < len(cell) else "").ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for number in range(max(len(cell) for cell in row))
    ]
