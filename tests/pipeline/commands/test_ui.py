"""`hpcm ui` finds the page of the runs, and a port for it."""

import socket
from pathlib import Path

import pytest
from mini import Hpcm

from pipeline.commands import ui
from pipeline.tracking.store import EXPERIMENT, Store


def test_the_page_is_that_of_the_experiment_by_name(
    stored_runs: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    store = Store.default(stored_runs)
    client = store.client()
    client.rename_experiment(client.get_experiment_by_name(EXPERIMENT).experiment_id, "somebody's")
    wanted = store.client().get_experiment_by_name(EXPERIMENT).experiment_id  # a new one
    served = []
    monkeypatch.setattr(ui, "serve", lambda store, port: served.append((store.uri, port)))
    printed = hpcm("ui", "--runs", stored_runs, "--port", 5123).out
    options = "workflowType=machine_learning&viewStateShareKey=results"
    assert printed == f"runs: http://127.0.0.1:5123/#/experiments/{wanted}/runs?{options}\n"
    assert served == [(store.uri, 5123)]
    assert "metrics.`final/bpp`" in client.get_experiment(wanted).tags["mlflow.sharedViewState.results"]


def test_the_page_of_a_server_is_named_without_the_password(monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@host:5000")
    monkeypatch.setattr(ui, "address", lambda store, server: server)
    assert hpcm("ui").out == "http://host:5000\n"


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(ui, "FIRST_PORT", taken.getsockname()[1])
        assert ui.free_port() != taken.getsockname()[1]


def test_a_folder_without_runs_is_refused(tmp_path: Path, hpcm: Hpcm) -> None:
    assert "this folder has no runs yet" in hpcm("ui", "--runs", tmp_path, code=1).err
    assert not list(tmp_path.iterdir())
