"""One piece of work for each of several files, where one bad file does not stop the next."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.commands.display import console, errors, print_above_bar, show, show_json
from pipeline.common.tables import Table
from pipeline.evaluation.conversions import Conversion

Item = TypeVar("Item")


class Refinement:
    """The iterations on one file, in a line of their own.

    If `completes`, the first Ctrl-C ends the iterations, and the file is completed. A second one ends the process.
    """

    stopped = False

    def __init__(self, completes: bool):
        self.completes = completes

    @contextmanager
    def shown(self, bar: Progress) -> Iterator[None]:
        """Show the iterations below the files, and receive Ctrl-C."""
        self._bar, self._task = bar, bar.add_task("refinement", visible=False)
        before = signal.getsignal(signal.SIGINT)
        if self.completes:
            signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def go_on(self, iteration: int, iterations: int) -> bool:
        """Show the number of iterations that are done. Returns False after Ctrl-C."""
        if iteration == 0:
            self._bar.reset(self._task, total=iterations, visible=True)
        self._bar.update(self._task, completed=iteration)
        return not self.stopped

    def _stop(self, *_: object) -> None:
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def each_file(
    items: Sequence[tuple[Path, Item]],
    work: Callable[[Item], Iterable[str]],
    refinement: Refinement | None = None,
) -> bool:
    """Call `work` on every item and print the messages that it returns, on standard error.

    Each item has a path, which starts its messages. An error is printed and the next item follows. Returns whether all
    items succeeded. After Ctrl-C in a refinement, its file is completed, and no other file is begun.
    """
    complete = True
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = errors.is_terminal and not errors.quiet
    with (
        Progress(
            *columns, console=errors, transient=True, disable=not shown, redirect_stdout=console.is_terminal
        ) as bar,
        refinement.shown(bar) if refinement else nullcontext(),
    ):
        task = bar.add_task("", total=len(items))
        for done, (path, item) in enumerate(items):
            bar.update(task, description=path.name)
            try:
                if refinement and refinement.stopped:
                    raise KeyboardInterrupt
                for message in work(item):
                    print_above_bar(f"{path}: {message}", errors)
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
    conversions: Sequence[Conversion],
    convert: Callable[[Conversion], Iterable[str]],
    table: Table,
    values: list[dict[str, Any]] | None = None,
    refinement: Refinement | None = None,
) -> None:
    """Do every conversion, and show the table that they filled, or `values` as JSON. Exits 1 if one failed."""
    complete = each_file([(conversion.source, conversion) for conversion in conversions], convert, refinement)
    if values is not None:
        show_json(values)
    elif table.rows:
        show(table)
    if not complete:
        raise typer.Exit(1)
