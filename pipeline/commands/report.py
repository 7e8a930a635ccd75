"""`hpcm report`: all results on one page."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.display import console
from pipeline.commands.options import Runs
from pipeline.evidence.report import write


def report(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [default: `report` in --runs].")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe to report on; repeatable [default: all in --runs].")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE/STAGE", help="Give the BD-rate of every stage against this one, such as tiny/control."
        ),
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write all results in a folder of runs to one self-contained HTML page, and the figures as PNG."""
    page = write(runs, output or runs / "report", recipe or (), reference)
    console.print(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")
