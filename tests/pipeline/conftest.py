import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mini import Finished, Hpcm, mini_chain, run_chain

from pipeline.commands import main as cli
from pipeline.tracking.store import make_database


@dataclass(frozen=True)
class Printed:
    """What a command printed."""

    out: str
    err: str
    raw: bytes
    """The bytes on standard output."""


@pytest.fixture
def hpcm(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Hpcm:
    """A function that runs the command line in this process, checks its exit code, and returns what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, code: int = 0) -> Printed:
        monkeypatch.setattr(sys, "argv", ["hpcm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsysbinary.readouterr()
        out, err = (stream.decode(errors="replace") for stream in printed)
        assert (ended.value.code or 0) == code, out + err
        return Printed(out, err, printed.out)

    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An empty folder of runs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A chain run to Phase 4 in this process, without MLflow, and what was said; not to be changed."""
    chain = mini_chain(tmp_path_factory.mktemp("finished"), "phase4")
    return chain, run_chain(chain)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow database whose tables exist: making them takes longer than most tests."""
    folder = tmp_path_factory.mktemp("store")
    make_database(folder / "mlflow.db")
    return folder


@pytest.fixture
def stored_runs(runs: Path, empty_store: Path) -> Path:
    """A folder of runs with an empty store."""
    shutil.copy(empty_store / "mlflow.db", runs)
    return runs
