"""Tables of results: rows of named values, as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.runs import write_atomically

_ERROR = "_error"


@dataclass(frozen=True)
class Table:
    """A titled table.

    Attributes:
        title: what it is of.
        rows: values by column; a column may be missing from a row.
        shown: column -> its heading and format, as text and Markdown show it; with the standard
            error where there is a column `NAME_error`.
        notes: sentences that the table cannot be read without.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    shown: Mapping[str, tuple[str, str]]
    notes: Sequence[str] = field(default=())

    def text(self) -> str:
        """The table in columns that are aligned by spaces."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            first, *others = (
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join((first, *others)).rstrip())
        return "\n".join([self.title, *lines, *self.notes]) + "\n"

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        head, *body = self._cells()
        lines = ["| " + " | ".join(row) + " |" for row in (head, *body)]
        lines.insert(1, "|" + "---|" * len(head))
        notes = ["", " ".join(self.notes)] if self.notes else []
        return "\n".join([*lines, *notes]) + "\n"

    def _cells(self) -> list[list[str]]:
        heads = [heading for heading, _ in self.shown.values()]
        body = [
            [_cell(row, column, how) for column, (_, how) in self.shown.items()]
            for row in self.rows
        ]
        return [heads, *body]


def write_csv(path: Path, tables: Sequence[Table]) -> None:
    """Write all rows of all tables, with every column that any of them has."""
    columns = list(dict.fromkeys(name for table in tables for row in table.rows for name in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for table in tables:
                writer.writerows({k: _known(v) for k, v in row.items()} for row in table.rows)

    write_atomically(path, write)


def json_rows(table: Table) -> list[dict[str, Any]]:
    """The rows with None for NaN, which is no JSON."""
    return [{name: _known(value) for name, value in row.items()} for row in table.rows]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(row: Mapping[str, Any], column: str, how: str) -> str:
    value = _known(row.get(column))
    if value is None:
        return "-"
    error = _known(row.get(column + _ERROR))
    return format(value, how) + (f" ± {error:{how.lstrip('+')}}" if error is not None else "")
