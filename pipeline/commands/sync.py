"""`hpcm sync`: bring MLflow up to a folder of runs."""

from pathlib import Path

import typer

from pipeline.commands.display import console, print_above_bar
from pipeline.commands.options import Runs
from pipeline.common.errors import UserError
from pipeline.common.folder_lock import is_held
from pipeline.records.chains import CHAIN_FILE
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import Store


def sync(runs: Runs = Path("runs")) -> None:
    """Add what MLflow lacks of these runs; exits 1 if it lacks something afterwards.

    The store is the one in the folder, or the server in MLFLOW_TRACKING_URI. The command may be repeated.
    """
    if not runs.is_dir():
        raise typer.BadParameter(f"no such folder: {runs}", param_hint="--runs")
    mirror, failed = Mirror(Store.default(runs)), False
    for path in sorted(runs.glob(f"*/*/{CHAIN_FILE}")):
        try:
            mirror.chain(path.parent, working=is_held(path.parent))
            print_above_bar(f"{path.parent}: {mirror.store.shown} has all of it")
        except UserError as error:
            console.print(f"{path.parent}: {error}")
            failed = True
    if failed:
        raise typer.Exit(1)
