"""A real MLflow server with PostgreSQL, served artifacts and passwords. All of them fail while runs write to it."""

import os
import threading
import time
from pathlib import Path

import pytest
from kills import attempt, exit_code, history, stage_runs
from mini import mini_chain
from mlflow_server import PASSWORD, USER, missing, mlflow_server
from typer.testing import CliRunner

from pipeline.commands.main import app
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}; `make test-server` installs the packages"),
]
STEPS = 120
DATABASE_AWAY = float(os.environ.get("DATABASE_AWAY", "60"))
"""Seconds for which the database is stopped."""


def write(outbox: Outbox, number: int, file: Path) -> None:
    """Log as a chain does: open a run, log step by step, keep a file, end the run."""
    run = outbox.run(f"key-{number}", f"chain {number}")
    run.parameters({"number": number})
    for step in range(1, STEPS + 1):
        run.metrics({"loss": float(number * step), "bpp": 1.0 / step}, step)
        time.sleep(DATABASE_AWAY / STEPS)
    run.artifact(file)
    run.end("FINISHED")


def test_every_step_arrives_once_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_server() as (server, database):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong password")
        log = tmp_path / "log"
        told = {name: os.environ[name] for name in os.environ if name.startswith("MLFLOW_TRACKING")}
        assert exit_code(attempt(tmp_path / "runs", "baseline", [], {**told, "LOG": str(log)})) == 0
        assert "log entries are not sent yet" in log.read_text()
        assert "a wrong password" not in log.read_text()
        print(log.read_text())

        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        notes: list[str] = []
        store = Store.default(tmp_path / "runs")
        outboxes = [Outbox(tmp_path / f"outbox-{number}", store, notes.append) for number in range(3)]
        kept = tmp_path / "file.txt"
        kept.write_text("kept")
        writers = [
            threading.Thread(target=write, args=(outbox, number, kept)) for number, outbox in enumerate(outboxes)
        ]
        for writer in writers:
            writer.start()
        time.sleep(DATABASE_AWAY / 10)
        server.kill()
        server.start()
        time.sleep(DATABASE_AWAY / 10)
        database.stop()
        time.sleep(DATABASE_AWAY)
        database.start()
        for writer in writers:
            writer.join()
        assert [outbox.close(300) for outbox in outboxes] == [True] * 3
        print("\n".join(notes))
        assert "log entries reach MLflow again" in notes

        client = store.client()
        (experiment,) = (found for found in client.search_experiments() if found.name == "hpcm")
        found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert sorted(found) == ["chain 0", "chain 1", "chain 2"]
        for number in range(3):
            run = found[f"chain {number}"]
            logged = history(client, run)
            assert logged["loss"] == [(step, float(number * step)) for step in range(1, STEPS + 1)]
            assert [step for step, _ in logged["bpp"]] == list(range(1, STEPS + 1))
            assert run.info.status == "FINISHED"
            copy = client.download_artifacts(run.info.run_id, "file.txt", str(tmp_path))
            assert Path(copy).read_text() == "kept"

        sent = CliRunner().invoke(app, ["sync", "--runs", str(tmp_path / "runs")])
        assert sent.exit_code == 0, sent.output
        chain = mini_chain(tmp_path / "runs", "baseline")
        client, stages = stage_runs(chain)
        (run,) = stages["baseline"]
        assert [step for step, _ in history(client, run)["train/scratch/loss"]] == [2, 4, 6]
        assert CliRunner().invoke(app, ["audit", "--runs", str(tmp_path / "runs")]).exit_code == 0


def test_the_price_of_logging(tmp_path: Path) -> None:
    """Prints the training time that logging 100 000 values takes. No server answers at the address."""
    outbox = Outbox(tmp_path / "outbox", Store("http://127.0.0.1:9"), lambda line: None)
    run = outbox.run("key", "name")
    began = time.perf_counter()
    for step in range(10_000):
        run.metrics({f"value-{number}": 1.0 for number in range(10)}, step)
    seconds = time.perf_counter() - began
    print(f"100 000 values in 10 000 steps: {seconds:.2f} s, or {seconds / 100:.3f} % of steps of 1 s")
    outbox.close(0)
    assert outbox.waiting >= 10_000
