"""One piece of work for each of several files, where one bad file does not stop the next."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.commands.display import console, errors, print_above_bar, show
from pipeline.common.tables import Table
from pipeline.evaluation.conversions import Conversion

Item = TypeVar("Item")


def each_file(items: Sequence[tuple[Path, Item]], work: Callable[[Item], Iterable[str]]) -> bool:
    """Call `work` on every item and print the messages that it returns.

    Each item has a path, which starts its messages. An error is printed and the next item follows. Returns whether all
    items succeeded.
    """
    complete = True
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = errors.is_terminal and not errors.quiet
    with Progress(
        *columns, console=errors, transient=True, disable=not shown, redirect_stdout=console.is_terminal
    ) as bar:
        task = bar.add_task("", total=len(items))
        for done, (path, item) in enumerate(items):
            bar.update(task, description=path.name)
            try:
                for message in work(item):
                    print_above_bar(f"{path}: {message}")
            except KeyboardInterrupt:
                print(f"stopped at {path}; {done} of {len(items)} files are done", file=sys.stderr)
                raise
            except Exception as error:  # Libraries may raise anything for a bad file; the next is still done.
                complete = False
                reason = (str(error) or type(error).__name__).removeprefix(f"{path}: ").splitlines()[0]
                print(f"error: {path}: {reason}", file=sys.stderr)
            bar.advance(task)
    return complete


def convert_each(
    conversions: Sequence[Conversion], convert: Callable[[Conversion], Iterable[str]], table: Table
) -> None:
    """Do every conversion, and show the table that they filled. Exits 1 if one failed."""
    complete = each_file([(conversion.source, conversion) for conversion in conversions], convert)
    if table.rows:
        show(table)
    if not complete:
        raise typer.Exit(1)
