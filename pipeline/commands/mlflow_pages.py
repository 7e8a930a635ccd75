"""MLflow's pages on a folder of runs."""

import os
import socket
import sys
from itertools import chain
from typing import NoReturn

from pipeline.tracking.store import EXPERIMENT, Store

FIRST_PORT = 5000
PORTS_TRIED = 100


def address(store: Store, server: str) -> str:
    """The page that lists the runs, on a server whose address is given."""
    experiment = store.client().get_experiment_by_name(EXPERIMENT)
    assert experiment is not None  # The client has made it where it was missing.
    # MLflow's first page is for language models: the type of workflow asks for the one that shows runs.
    return f"{server.rstrip('/')}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"


def free_port() -> int:
    """The first port from 5000 on that nobody listens at, or else any that is free."""
    for port in chain(range(FIRST_PORT, FIRST_PORT + PORTS_TRIED), [0]):
        with socket.socket() as trial:
            # As a server does: a port whose last connection was closed just now is free.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(trial.getsockname()[1])
    raise OSError("no port is free")


def serve(store: Store, port: int) -> NoReturn:
    """Become MLflow's server."""
    where = ["--backend-store-uri", store.uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *where])
