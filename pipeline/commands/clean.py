"""`hpcm clean`: delete interrupted trainings and superseded stages, which are kept until a person deletes them."""

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pipeline.chain.stage_task import record_in
from pipeline.commands.display import console
from pipeline.commands.options import Runs
from pipeline.common.files import free_name
from pipeline.common.folder_lock import held

TRAINING, ABANDONED, SUPERSEDED = PLACES = "training", "abandoned", "superseded"
"""Folders of a chain in which trainings and stages lie that are not published."""


def clean(
    runs: Runs = Path("runs"),
    superseded: Annotated[bool, typer.Option("--superseded", help="List stages that were rebuilt as well.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete all of them without asking.")] = False,
) -> None:
    """List the interrupted trainings, and ask for each whether to delete it.

    A training that is kept resumes when its recipe and images are used again. A superseded stage that is kept moves
    back when they are.
    """
    places = [f"{TRAINING}/*/*", f"{ABANDONED}/*/*", *([f"{SUPERSEDED}/*"] if superseded else [])]
    folders = [folder for place in places for folder in sorted(runs.glob(f"*/*/{place}"))]
    found = [folder for folder in folders if any(path.is_file() for path in folder.iterdir())]
    if not found:
        console.print(f"no interrupted trainings{' or superseded stages' if superseded else ''} in {runs}")
    for folder in found:
        console.print(_title(folder))
        if yes or typer.confirm("Delete it?"):
            _delete(folder)


def _title(folder: Path) -> str:
    """One line that helps a person to decide."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    record, kind = record_in(folder), _place(folder)[1]
    what = record.name if record else folder.parent.name
    steps = f"{record.trained.steps:,} steps" if record else "damaged"
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(file.st_mtime for file in files)))
    size = sum(file.st_size for file in files) / 1e6
    kept = {ABANDONED: " (given up with --fresh)", SUPERSEDED: " (superseded)"}.get(kind, "")
    return f"{folder}: {what}: {steps}, saved {saved}, {size:.1f} MB{kept}"


def _place(folder: Path) -> tuple[Path, str]:
    """The chain's folder, and the name of the folder in it that contains a training or stage."""
    place = next(parent for parent in folder.parents if parent.name in PLACES)
    return place.parent, place.name


def _delete(folder: Path) -> None:
    """Delete a training or a stage. Raises FolderInUse if a run uses the chain's folder."""
    chain, kind = _place(folder)
    moved = folder
    with held(chain):
        if kind == TRAINING:
            # One rename decides: a run could resume from the states that an interruption leaves here.
            moved = free_name(chain / ABANDONED / folder.parent.name / folder.name, folder.rename)
        shutil.rmtree(moved)
        for emptied in (*folder.parents[:2], *moved.parents[:2]):
            with suppress(OSError):  # It may hold others.
                emptied.rmdir()
