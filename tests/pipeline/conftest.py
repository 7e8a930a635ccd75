import shutil
from pathlib import Path

import pytest
from mini import Notes, mini_chain, run_chain

from pipeline.chain.chain import Chain
from pipeline.tracking.store import Store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow database whose tables exist: making them takes longer than most tests."""
    folder = tmp_path_factory.mktemp("store")
    Store.default(folder).client()
    return folder


@pytest.fixture
def runs(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs with an empty store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store / "mlflow.db", folder)
    return folder


@pytest.fixture(scope="session")
def finished(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Notes]:
    """A chain run to Phase 4 without processes, and what was said; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(empty_store / "mlflow.db", folder)
    chain, notes = mini_chain(folder, "phase4"), Notes()
    run_chain(chain, notes)
    return chain, notes
