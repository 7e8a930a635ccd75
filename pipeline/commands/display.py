"""The two consoles of the command line, and what is printed on them."""

import json
import os
from typing import Any

from rich.console import Console

from pipeline.common.tables import Table

IS_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
"""Whether this is the first of the processes that `accelerate launch` starts. The others print nothing."""
console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not IS_FIRST_PROCESS)
"""Results, on standard output. Only a terminal wraps lines."""
errors = Console(highlight=False, markup=False, quiet=not IS_FIRST_PROCESS, stderr=True)
"""Progress, on standard error."""


def be_quiet(quiet: bool) -> None:
    """Print neither results nor progress, for `--quiet`."""
    console.quiet = errors.quiet = quiet or not IS_FIRST_PROCESS


def print_above_bar(line: str, to: Console | None = None) -> None:
    """Print a line of results, or to another console, above the progress bar if there is one.

    The bar is on standard error. If the other console printed to the same terminal, the bar's line would stay there.
    """
    to = to or console
    (errors if to.is_terminal and errors.is_terminal else to).print(line, soft_wrap=True)


def show(*tables: Table) -> None:
    """Print tables: framed and wrapped at a terminal that is wide enough, as plain columns elsewhere."""
    for table in tables:
        framed = table.rich()
        needed = console.measure(framed, options=console.options.update(width=1000)).minimum
        if console.is_terminal and needed <= console.width:
            console.print(framed, soft_wrap=False)
        else:
            console.print(table.plain())


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False), file=console.file)


def duration(seconds: float) -> str:
    """A time in one or two units: `40 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
