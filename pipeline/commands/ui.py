"""`hpcm ui`: MLflow's pages on a folder of runs."""

import json
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
from pipeline.tracking.store import Store, experiment

FIRST_PORT = 5000
PORTS_TRIED = 100
VIEW = "mlflow.sharedViewState.results"
"""Tag of the experiment in which MLflow's pages look up a view of this name."""
COLUMNS = json.dumps(
    {
        "selectedColumns": [
            *(f"metrics.`final/{name}`" for name in ("bpp", "psnr_db", "ms_ssim", "rd_loss")),
            "metrics.`model/kmacs_per_pixel`",
            "attributes.`Models`",
        ]
    }
)


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
        print(address(store, store.shown.replace("***@", "")))
        return
    port = port or free_port()
    print(f"runs: {address(store, f'http://127.0.0.1:{port}')}", flush=True)
    serve(store, port)


def address(store: Store, server: str) -> str:
    """Address of the page that lists the runs, on the server at `server`, with a column for each result."""
    client = store.client()
    with store.errors_as_its_own():
        found = experiment(client)
        if found.tags.get(VIEW) != COLUMNS:
            client.set_experiment_tag(found.experiment_id, VIEW, COLUMNS)
    # MLflow opens its page for language models unless the workflow type selects the page of runs.
    options = f"workflowType=machine_learning&viewStateShareKey={VIEW.rpartition('.')[2]}"
    return f"{server.rstrip('/')}/#/experiments/{found.experiment_id}/runs?{options}"


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
    os.environ["MLFLOW_BACKEND_STORE_URI"] = store.uri  # Anyone can read the arguments of a process.
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "mlflow", "server", *where])
