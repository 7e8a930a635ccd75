"""Printed tables: whole words at a terminal, plain columns in a pipe."""

from io import StringIO

import pytest
from rich.console import Console

from pipeline.commands import display
from pipeline.common.tables import Table


def table() -> Table:
    found = Table("a title", ("stage", "why", "steps"), left=2)
    found.add("phase1", "interrupted: the recipe changed\nand its images", "1,000")
    found.add("baseline", "done", "5")
    return found


def test_plain_tables_have_one_line_per_row_and_aligned_columns() -> None:
    assert table().plain().splitlines() == [
        "a title",
        "stage     why                                               steps",
        "phase1    interrupted: the recipe changed / and its images  1,000",
        "baseline  done                                                  5",
    ]


def test_a_terminal_folds_between_words() -> None:
    console = Console(width=34, record=True)
    console.print(table().rich())
    words = {word for line in console.export_text().splitlines() for word in line.split()}
    assert {"interrupted:", "recipe", "changed", "images", "baseline", "1,000"} <= words


def test_a_narrow_terminal_shows_all_columns_and_folds_long_names() -> None:
    found = Table("", ("file", "codec", "W×H", "bytes"), left=2)
    found.add("forensics-img-20200827-231612.hpcm", "bundled control-0.0067.safetensors", "1024×768", "22586")
    console = Console(width=54, record=True)
    console.print(found.rich())
    lines = console.export_text().splitlines()
    assert all(len(line) <= 54 for line in lines)
    printed = "".join(lines)
    assert {"W×H", "bytes", "1024×768", "22586", "forensics-img-20", "200827-231612.hp"} <= {*printed.split()}


def test_a_terminal_too_narrow_for_all_columns_gets_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for width, framed in ((40, True), (20, False)):
        console = Console(width=width, record=True, force_terminal=True, soft_wrap=True, file=StringIO())
        monkeypatch.setattr(display, "console", console)
        display.show(table())
        printed = console.export_text()
        assert ("─" in printed) == framed
        assert "1,000" in printed


def test_a_table_without_column_names_has_no_heading() -> None:
    found = Table("", ("", ""), left=2)
    found.add("stage", "phase1")
    assert found.plain() == "stage  phase1"
