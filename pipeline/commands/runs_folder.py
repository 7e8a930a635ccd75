"""The commands for a folder of runs as a whole: send its log entries, clear it, show its pages."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import MIGRATE, RESULTS, Runs
from pipeline.common.errors import UserError

SYNC_PATIENCE = 120.0
"""Seconds for which `hpcm sync` tries to send a chain's entries to MLflow."""


def sync(runs: Runs = Path("runs")) -> None:
    """Send the log entries that MLflow has not received yet; exits 1 if some are left or set aside."""
    from pipeline.commands.display import console, print_above_bar
    from pipeline.common.folder_lock import held
    from pipeline.tracking.outbox import Outbox
    from pipeline.tracking.store import Store

    if not runs.is_dir():
        raise typer.BadParameter(f"no such folder: {runs}", param_hint="--runs")
    folders = sorted(path.parent for path in runs.glob("*/*/outbox/journal.jsonl"))
    sent = []
    for folder in folders:
        try:
            with held(folder.parent):
                outbox = Outbox(folder, Store.default(runs), print_above_bar)
                print_above_bar(f"{folder.parent}: {outbox.waiting} log entries to send to {outbox.store.shown}")
                sent.append(outbox.close(SYNC_PATIENCE) and not outbox.entries_set_aside)
        except (UserError, OSError) as error:
            console.print(str(error), soft_wrap=True)
            sent.append(False)
    if not folders:
        console.print(f"no log entries to send in {runs}")
    if not all(sent):
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
