import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mini import Finished
from mlflow_server import Server

from pipeline.records import metrics
from pipeline.records.metrics import MetricsLog
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import Store


@pytest.fixture(scope="session")
def chain(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished chain to Phase 1, with system metrics; not to be changed."""
    folder = tmp_path_factory.mktemp("mirrored") / "mini" / finished[0].folder.name
    for name in ("baseline", "phase1"):
        shutil.copytree(finished[0].folder / name, folder / name)
    shutil.copy(finished[0].folder / "chain.json", folder)
    log = MetricsLog(folder / "phase1" / metrics.SYSTEM)
    for number in range(2):
        log.append({"system/cpu_utilization_percentage": 50.0 + number}, number)
    return folder


@pytest.fixture(scope="session")
def store(chain: Path, empty_store: Path) -> Store:
    """The store in the chain's folder of runs, to which the chain was mirrored; not to be changed."""
    shutil.copy(empty_store / "mlflow.db", chain.parents[1])
    found = Store.default(chain.parents[1])
    Mirror(found).chain(chain, working=False)
    return found


@pytest.fixture
def fresh(tmp_path: Path, empty_store: Path) -> Store:
    """An empty store."""
    (tmp_path / "fresh").mkdir()
    shutil.copy(empty_store / "mlflow.db", tmp_path / "fresh")
    return Store.default(tmp_path / "fresh")


@pytest.fixture
def copied(chain: Path, store: Store, tmp_path: Path) -> tuple[Path, Store]:
    """A copy of the chain and its store, which may be changed."""
    shutil.copytree(chain.parents[1], tmp_path / "copied")
    return tmp_path / "copied" / "mini" / chain.name, Store.default(tmp_path / "copied")


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[Server]:
    """An MLflow server with an empty store, which runs."""
    (tmp_path / "server").mkdir()
    shutil.copy(empty_store / "mlflow.db", tmp_path / "server")
    server = Server(tmp_path / "server", f"sqlite:///{tmp_path}/server/mlflow.db")
    server.start()
    yield server
    server.kill()
