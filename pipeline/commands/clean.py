"""`hpcm clean`: delete interrupted trainings."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.chain.leftovers import leftovers
from pipeline.commands.display import console
from pipeline.commands.options import Runs


def clean(
    runs: Runs = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Delete all of them without asking.")] = False,
) -> None:
    """List the interrupted trainings, and ask for each whether to delete it.

    A training that is kept resumes when its recipe and images are used again.
    """
    found = list(leftovers(runs))
    if not found:
        console.print(f"no interrupted trainings in {runs}")
    for leftover in found:
        console.print(leftover.title, soft_wrap=True)
        if yes or typer.confirm("Delete it?"):
            leftover.delete()
