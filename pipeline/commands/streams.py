"""Standard input and output as the file `-`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from pipeline.commands.display import console

STREAM = Path("-")


def with_standard_streams(sources: str, suffix: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take `-` in its parameters `sources` and `output`; `suffix` is that of its output files.

    The command works on temporary files, which hold standard input and the output before it is sent. If the output
    goes to standard output, tables and messages go to standard error.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapped(**options: Any) -> None:
            if STREAM in options[sources] or options["output"] == STREAM:
                _through_files(command, options, sources, suffix)
            else:
                command(**options)

        return wrapped

    return decorate


@contextmanager
def from_standard_input(given: list[Path]) -> Iterator[list[Path]]:
    """The given files, with a temporary file that holds standard input in place of `-`."""
    with TemporaryDirectory(prefix="hpcm-") as folder:
        file = Path(folder) / "standard-input"
        if STREAM in given:
            file.write_bytes(sys.stdin.buffer.read())
        yield [file if path == STREAM else path for path in given]


def _through_files(command: Callable[..., None], options: dict[str, Any], sources: str, suffix: str) -> None:
    given, output = options[sources], options["output"]
    if len(given) > 1:
        raise typer.BadParameter("`-` is one file: give no other files with it, and only one file for standard output")
    if given[0].is_dir():
        raise typer.BadParameter(f"{given[0]} is a folder: only one file can go to standard output")
    with from_standard_input(given) as files, TemporaryDirectory(prefix="hpcm-") as folder:
        options = {**options, sources: files}
        if output not in (None, STREAM):
            command(**options)
            return
        target = Path(folder) / f"standard-output{suffix}"
        console.stderr = True
        try:
            command(**{**options, "output": target})
        finally:
            console.stderr = False
        sys.stdout.buffer.write(target.read_bytes())
        sys.stdout.buffer.flush()
