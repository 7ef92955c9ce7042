"""Tables for people: aligned columns in a file or pipe, the same with colours on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are text already, in the order of the columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[str]
    """Columns of words; all others are numbers, and so aligned to the right."""
    alarms: frozenset[int] = frozenset()
    """Numbers of the rows that something is wrong with."""


def table_lines(table: Table) -> list[str]:
    """The table as lines of aligned columns, the header first."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.columns))]
    return ["  ".join(_aligned(table, row, widths)).rstrip() for row in rows]


def show(parts: Sequence[str | Table]) -> None:
    """Prints lines and tables, one below the other."""
    if sys.stdout.isatty():
        _show_rich(parts)
        return
    for part in parts:
        print(part if isinstance(part, str) else "\n".join(table_lines(part)))


def _aligned(table: Table, row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column in table.left else cell.rjust(width)
        for column, cell, width in zip(table.columns, row, widths, strict=True)
    ]


def _show_rich(parts: Sequence[str | Table]) -> None:
    from rich import table as rich_table
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False)
            continue
        shown = rich_table.Table(box=None)
        for column in part.columns:
            shown.add_column(column, justify="left" if column in part.left else "right")
        for number, row in enumerate(part.rows):
            # As Text: what servers say may contain brackets, which rich would take for markup.
            cells = [Text(cell) for cell in row]
            shown.add_row(*cells, style="red" if number in part.alarms else None)
        console.print(shown)
