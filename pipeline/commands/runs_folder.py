"""The commands for a folder of runs as a whole: send its log entries, clear it, show its pages."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import MIGRATE, RESULTS, Runs
from pipeline.common.errors import UserError
from pipeline.common.folder_lock import is_held


def sync(runs: Runs = Path("runs")) -> None:
    """Bring MLflow up to these runs; exits 1 if it lacks something afterwards.

    It adds what is missing, to the store in the folder or to the server in MLFLOW_TRACKING_URI, and may be repeated.
    """
    from pipeline.commands.display import console, print_above_bar
    from pipeline.records.chains import CHAIN_FILE
    from pipeline.tracking.mirror import Mirror
    from pipeline.tracking.store import Store, brief

    if not runs.is_dir():
        raise typer.BadParameter(f"no such folder: {runs}", param_hint="--runs")
    mirror, failed = Mirror(Store.default(runs)), False
    for path in sorted(runs.glob(f"*/*/{CHAIN_FILE}")):
        try:
            mirror.chain(path.parent, running=is_held(path.parent))
            print_above_bar(f"{path.parent}: {mirror.store.shown} is up to date")
        except Exception as error:  # MLflow passes on the errors of its backends.
            console.print(f"{path.parent}: {error if isinstance(error, UserError) else brief(error)}", soft_wrap=True)
            failed = True
    if failed:
        raise typer.Exit(1)


def clean(
    runs: Runs = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Delete all of them without asking.")] = False,
) -> None:
    """List the interrupted trainings, and ask for each whether to delete it.

    A training that is kept resumes when its recipe and images are used again.
    """
    from pipeline.chain.leftovers import leftovers
    from pipeline.commands.display import console

    found = list(leftovers(runs))
    if not found:
        console.print(f"no interrupted trainings in {runs}")
    for leftover in found:
        console.print(leftover.title, soft_wrap=True)
        if yes or typer.confirm("Delete it?"):
            leftover.delete()


def ui(
    runs: Runs = Path("runs"),
    port: Annotated[
        int | None, typer.Option(help="Port of the server [default: the first free one from 5000].")
    ] = None,
) -> None:
    """Serve MLflow's pages on these runs, and print the address of the list of runs."""
    from pipeline.commands.mlflow_pages import address, free_port, serve
    from pipeline.tracking.store import Store

    store = Store.default(runs)
    if store.database is not None and not store.database.exists():
        raise UserError(f"{runs}: this folder has no runs yet; name another one with --runs")
    if store.uri.startswith("http"):
        print(address(store, store.uri))
        return
    port = port or free_port()
    print(f"runs: {address(store, f'http://127.0.0.1:{port}')}", flush=True)
    serve(store, port)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(rich_help_panel=MIGRATE)(sync)
    app.command(rich_help_panel=MIGRATE)(clean)
    app.command(rich_help_panel=RESULTS)(ui)
