"""Tables as data: what is printed at a terminal is also written as Markdown or set in a page."""

from dataclasses import dataclass, field

from rich import box
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """A table of text, whose title may be empty; its first `left` columns are aligned left, the others right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    left: int = 1

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)

    def rich(self) -> RichTable:
        """For a terminal; lines too long for it are folded."""
        title = Text(self.title) if self.title else None
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for number, column in enumerate(self.columns):
            text = number < self.left
            table.add_column(Text(column), justify="left" if text else "right", no_wrap=not text, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """As a Markdown table below its title."""
        rules = [":--" if number < self.left else "--:" for number in range(len(self.columns))]
        lines = (_line(self.columns), _line(rules), *map(_line, self.rows))
        return "\n".join((f"**{self.title}**", "", *lines, ""))


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"


def shortest(value: float) -> str:
    """A number in as few digits as tell it from every other: `0.013`, and 0.0130000001 in full."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def number(value: float | None, form: str = ".4f") -> str:
    """A number in a table, or a dash where none is known."""
    return "–" if value is None else format(value, form)
