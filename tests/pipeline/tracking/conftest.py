import shutil
from pathlib import Path

import pytest

from pipeline.tracking.store import Store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow database whose tables exist: making them takes longer than most tests."""
    folder = tmp_path_factory.mktemp("store")
    Store.default(folder).client()
    return folder


@pytest.fixture
def runs(runs: Path, empty_store: Path) -> Path:
    """A folder of runs with an empty store."""
    shutil.copy(empty_store / "mlflow.db", runs)
    return runs
