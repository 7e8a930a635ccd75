"""`hpcm sync`: send what MLflow has not received yet."""

from pathlib import Path

import typer

from pipeline.commands.display import console, print_above_bar
from pipeline.commands.options import Runs
from pipeline.common.errors import UserError
from pipeline.common.folder_lock import held
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import Store

PATIENCE = 120.0
"""Seconds for which `hpcm sync` tries to send a chain's entries to MLflow."""


def sync(runs: Runs = Path("runs")) -> None:
    """Send the log entries that MLflow has not received yet; exits 1 if some are left or set aside."""
    if not runs.is_dir():
        raise typer.BadParameter(f"no such folder: {runs}", param_hint="--runs")
    folders = sorted(path.parent for path in runs.glob("*/*/outbox/journal.jsonl"))
    sent = []
    for folder in folders:
        try:
            with held(folder.parent):
                outbox = Outbox(folder, Store.default(runs), print_above_bar)
                print_above_bar(f"{folder.parent}: {outbox.waiting} log entries to send to {outbox.store.shown}")
                sent.append(outbox.close(PATIENCE) and not outbox.entries_set_aside)
        except (UserError, OSError) as error:
            console.print(str(error), soft_wrap=True)
            sent.append(False)
    if not folders:
        console.print(f"no log entries to send in {runs}")
    if not all(sent):
        raise typer.Exit(1)
