"""Tables as data, printed to a terminal or a pipe."""

import re
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """A table of text. Title and column names may be empty. The first `left` columns are aligned left, others right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    left: int = 1

    def add(self, *cells: str) -> None:
        """Add a row. Control characters in it, which files of other people may hold, are shown as `\\x1b`."""
        self.rows.append(tuple(map(printable, cells)))

    def rich(self) -> RichTable:
        """The table for a terminal. Long cells are wrapped between words."""
        title = Text(self.title) if self.title else None
        form: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
        table = RichTable(title=title, title_justify="left", show_header=any(self.columns), **form)
        for number, column in enumerate(self.columns):
            text = number < self.left
            cells = [column, *(row[number] for row in self.rows if number < len(row))]
            # At least as wide as its longest word. A column of text may be narrower, so that long names of files are
            # folded, and no column disappears.
            width = min(max(len(word) for cell in cells for word in cell.split(" ")), 12 if text else 40)
            table.add_column(
                Text(column), justify="left" if text else "right", no_wrap=not text, overflow="fold", min_width=width
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def plain(self) -> str:
        """The table for a pipe or a file: one line per row, columns aligned and at least two spaces apart."""
        # The lines of a cell are joined, so that a row stays one line.
        shown = [self.columns, *self.rows] if any(self.columns) else self.rows
        rows = [[" / ".join(cell.split("\n")) for cell in row] for row in shown]
        widths = [max(len(row[number]) for row in rows if number < len(row)) for number in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if number < self.left else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=False))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.title, *lines] if self.title else lines)


def printable(text: str) -> str:
    """A text without characters that a terminal obeys; they become `\\x1b`. Line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def shortest(value: float) -> str:
    """A number in at most six digits if these are exact (`0.013`), otherwise in full (`0.0130000001`)."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def number(value: float | None, form: str = ".4f") -> str:
    """A number formatted for a table, or a dash for None."""
    return "–" if value is None else format(value, form)
