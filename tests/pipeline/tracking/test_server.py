"""A real MLflow server with PostgreSQL, served artifacts and passwords. All of them fail while runs write to it."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from kills import attempt, exit_code, history, stage_runs
from mini import mini_chain
from mlflow_server import PASSWORD, USER, missing, mlflow_server
from typer.testing import CliRunner

from pipeline.commands.main import app
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import Run, Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}; `make test-server` installs the packages"),
]
PART = 30
"""Number of steps that each run logs between two failures."""
DATABASE_AWAY = float(os.environ.get("DATABASE_AWAY", "10"))
"""Seconds for which the database is stopped."""


def log_part(runs: Sequence[Run], part: int) -> None:
    """Log the steps of one part in each run; this waits for nothing."""
    for step in range(part * PART + 1, (part + 1) * PART + 1):
        for number, run in enumerate(runs):
            run.metrics({"loss": float(number * step), "bpp": 1.0 / step}, step)


def wait_for_text(file: Path, text: str) -> None:
    """Wait until another process has written this."""
    end = time.monotonic() + 600
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < end, f"{file} does not contain {text!r}"
        time.sleep(0.1)


def test_every_step_arrives_once_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_server() as (server, database):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong password")
        log = tmp_path / "log"
        told = {name: os.environ[name] for name in os.environ if name.startswith("MLFLOW_TRACKING")}
        locked_out = attempt(tmp_path / "runs", "baseline", [], {**told, "LOG": str(log)})
        wait_for_text(log, "401")

        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        notes: list[str] = []
        store = Store.default(tmp_path / "runs")
        outboxes = [Outbox(tmp_path / f"outbox-{number}", store, notes.append) for number in range(3)]
        runs = [outbox.run(f"key-{number}", f"chain {number}") for number, outbox in enumerate(outboxes)]
        log_part(runs, 0)
        server.wait_for_metrics()
        server.kill()
        log_part(runs, 1)
        server.start()
        server.wait_for_metrics()
        database.stop()
        log_part(runs, 2)
        time.sleep(DATABASE_AWAY)
        database.start()
        log_part(runs, 3)
        kept = tmp_path / "file.txt"
        kept.write_text("kept")
        for run in runs:
            run.artifact(kept)
            run.end("FINISHED")
        assert [outbox.close(120) for outbox in outboxes] == [True] * 3
        print("\n".join(notes))
        assert "log entries reach MLflow again" in notes

        client = store.client()
        (experiment,) = (found for found in client.search_experiments() if found.name == "hpcm")
        found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert sorted(found) == ["chain 0", "chain 1", "chain 2"]
        steps = range(1, 4 * PART + 1)
        for number in range(3):
            stored = found[f"chain {number}"]
            logged = history(client, stored)
            assert logged["loss"] == [(step, float(number * step)) for step in steps]
            assert [step for step, _ in logged["bpp"]] == list(steps)
            assert stored.info.status == "FINISHED"
            copy = client.download_artifacts(stored.info.run_id, "file.txt", str(tmp_path))
            assert Path(copy).read_text() == "kept"

        assert exit_code(locked_out) == 0
        assert "log entries are not sent yet" in log.read_text()
        assert "a wrong password" not in log.read_text()
        sent = CliRunner().invoke(app, ["sync", "--runs", str(tmp_path / "runs")])
        assert sent.exit_code == 0, sent.output
        chain = mini_chain(tmp_path / "runs", "baseline")
        client, stages = stage_runs(chain)
        (stage,) = stages["baseline"]
        assert [step for step, _ in history(client, stage)["train/scratch/loss"]] == [2, 4, 6]
        assert CliRunner().invoke(app, ["audit", "--runs", str(tmp_path / "runs")]).exit_code == 0


def test_the_price_of_logging(tmp_path: Path) -> None:
    """Prints the time that 10 000 values take from training. Nothing listens at the server's address."""
    outbox = Outbox(tmp_path / "outbox", Store("http://127.0.0.1:9"), lambda line: None)
    run = outbox.run("key", "name")
    began = time.perf_counter()
    for step in range(1_000):
        run.metrics({f"value-{number}": 1.0 for number in range(10)}, step)
    seconds = time.perf_counter() - began
    print(f"10 000 values in 1 000 steps: {seconds:.2f} s, or {seconds / 10:.3f} % of steps of 1 s")
    outbox.close(0)
    assert outbox.waiting >= 1_000
