"""`hpcm ui`: MLflow's pages on a folder of runs."""

import os
import socket
import sys
from itertools import chain
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.commands.options import Runs
from pipeline.common.errors import UserError
from pipeline.records.chains import CHAIN_FILE
from pipeline.tracking.store import EXPERIMENT, Store

FIRST_PORT = 5000
PORTS_TRIED = 100


def ui(
    runs: Runs = Path("runs"),
    port: Annotated[
        int | None, typer.Option(help="Port of the server [default: the first free one from 5000].")
    ] = None,
) -> None:
    """Serve MLflow's pages on these runs, and print the address of the list of runs."""
    store = Store.default(runs)
    if store.database is not None and not store.database.exists():
        if any(runs.glob(f"*/*/{CHAIN_FILE}")):
            raise UserError(f"{runs}: MLflow has none of these runs yet; add them with hpcm sync --runs {runs}")
        raise UserError(f"{runs}: this folder has no runs yet; name another one with --runs")
    if store.uri.startswith("http"):
        print(address(store, store.uri))
        return
    port = port or free_port()
    print(f"runs: {address(store, f'http://127.0.0.1:{port}')}", flush=True)
    serve(store, port)


def address(store: Store, server: str) -> str:
    """Address of the page that lists the runs, on the server at `server`."""
    experiment = store.client().get_experiment_by_name(EXPERIMENT)
    assert experiment is not None  # The client creates it if it is missing.
    # MLflow opens its page for language models unless the workflow type selects the page of runs.
    return f"{server.rstrip('/')}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"


def free_port() -> int:
    """The first free port from 5000 to 5099, or else any free port."""
    for port in chain(range(FIRST_PORT, FIRST_PORT + PORTS_TRIED), [0]):
        with socket.socket() as trial:
            # Servers set this too. Without it, a port whose last connection closed just now looks taken.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(trial.getsockname()[1])
    raise OSError("no port is free")


def serve(store: Store, port: int) -> NoReturn:
    """Replace this process by MLflow's server, for one person on this machine."""
    # MLflow's default has four processes and a scheduler of jobs, which one person does not need.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    where = ["--backend-store-uri", store.uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "mlflow", "server", *where])
