from pathlib import Path

import pytest
from mini import Notes, mini_chain, run_chain

from pipeline.chain.chain import Chain


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Notes]:
    """A chain run to Phase 4 in this process, without MLflow, and what was said; not to be changed."""
    chain, notes = mini_chain(tmp_path_factory.mktemp("finished"), "phase4"), Notes()
    run_chain(chain, notes)
    return chain, notes
