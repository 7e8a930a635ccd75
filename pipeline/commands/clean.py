"""`hpcm clean`: delete interrupted trainings, which are kept until a person deletes them."""

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

KINDS = TRAINING, ABANDONED = "training", "abandoned"
"""Folders of a chain in which trainings lie that are not published."""


def clean(
    runs: Runs = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Delete all of them without asking.")] = False,
) -> None:
    """List the interrupted trainings, and ask for each whether to delete it.

    A training that is kept resumes when its recipe and images are used again.
    """
    folders = [folder for kind in KINDS for folder in sorted(runs.glob(f"*/*/{kind}/*/*"))]
    found = [folder for folder in folders if any(path.is_file() for path in folder.iterdir())]
    if not found:
        console.print(f"no interrupted trainings in {runs}")
    for folder in found:
        console.print(_title(folder), soft_wrap=True)
        if yes or typer.confirm("Delete it?"):
            _delete(folder)


def _title(folder: Path) -> str:
    """One line that helps a person to decide."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    record = record_in(folder)
    steps = f"{record.trained.steps:,} steps" if record else "damaged"
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(file.st_mtime for file in files)))
    size = sum(file.st_size for file in files) / 1e6
    kept = " (given up with --fresh)" if folder.parents[1].name == ABANDONED else ""
    return f"{folder}: {folder.parent.name}: {steps}, saved {saved}, {size:.1f} MB{kept}"


def _delete(training: Path) -> None:
    """Delete a training. Raises FolderInUse if a run uses the chain's folder."""
    chain, stage, folder = training.parents[2], training.parent.name, training
    with held(chain):
        if training.parents[1].name == TRAINING:
            # One rename decides: a run could resume from the states that an interruption leaves here.
            folder = free_name(chain / ABANDONED / stage / training.name, training.rename)
        shutil.rmtree(folder)
        for place in (training, folder):
            with suppress(OSError):  # The folders may hold other trainings.
                place.parent.rmdir()
                place.parents[1].rmdir()
