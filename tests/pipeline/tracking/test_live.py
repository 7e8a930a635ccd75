"""A run and its mirror: training neither waits for MLflow nor fails because of it."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mini import Notes
from mlflow import MlflowClient
from pages import shown

from pipeline.common.errors import Interrupted
from pipeline.records.metrics import SYSTEM, read_reports
from pipeline.tracking import live
from pipeline.tracking.live import live_mirror
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import Store
from pipeline.tracking.system_metrics import sampling


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSE", 0.05)
    monkeypatch.setattr(live, "PATIENCE", 60.0)
    monkeypatch.setattr(live, "PATIENCE_INTERRUPTED", 60.0)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the mirrors that were begun."""
    begun: list[Path] = []
    chain = Mirror.chain
    monkeypatch.setattr(
        Mirror, "chain", lambda mirror, folder, working: (begun.append(folder), chain(mirror, folder, working))
    )
    return begun


def until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "does not come about"
        time.sleep(0.02)


def test_everything_is_sent_before_a_run_ends(chain: Path, store: Store, fresh: Store) -> None:
    notes = Notes()
    with pytest.raises(Interrupted), live_mirror(fresh, notes.note, chain):
        raise Interrupted(15)
    assert notes.lines == []
    assert shown(fresh) == shown(store)


def test_a_server_that_is_away_is_told_once(chain: Path, tries: list[Path]) -> None:
    notes = Notes()
    with live_mirror(Store("http://me:s3cret@127.0.0.1:9"), notes.note, chain):
        until(lambda: notes.lines)
        until(lambda: len(tries) > 3)
    told, ended = notes.lines
    assert told.startswith("MLflow (http://***@127.0.0.1:9): ")
    assert "the run goes on" in told
    assert "`hpcm sync` sends the rest" in ended
    assert "s3cret" not in "".join(notes.lines)


def test_a_server_that_comes_back_gets_everything(
    chain: Path, store: Store, fresh: Store, tries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, log_batch, away = Notes(), MlflowClient.log_batch, threading.Event()

    def log(client: MlflowClient, *arguments: object, **options: object) -> None:
        if away.is_set():
            raise ConnectionError("away")
        log_batch(client, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "log_batch", log)
    away.set()
    with live_mirror(fresh, notes.note, chain):
        until(lambda: len(tries) > 3)
        away.clear()
        until(lambda: len(notes.lines) == 2)
    assert "ConnectionError: away; the run goes on" in notes.lines[0]
    assert notes.lines[1].endswith("answers again")
    assert shown(fresh) == shown(store)


def test_a_server_that_does_not_answer_is_not_waited_for(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, notes = threading.Event(), Notes()
    monkeypatch.setattr(Store, "client", lambda store: answered.wait())
    monkeypatch.setattr(live, "PATIENCE", 0.1)
    with live_mirror(Store("http://127.0.0.1:9"), notes.note, chain):
        pass  # The mirror still waits; the run has ended.
    assert notes.lines == ["MLflow does not have all of this run yet; `hpcm sync` sends the rest"]
    answered.set()


class _Nonsense(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, text = self.server.nonsense  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = _answer

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=[(200, b"{}"), (200, b"<html>welcome</html>"), (400, b"<html>bad gateway</html>"), (500, b"")])
def nonsense(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server that answers the same to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Nonsense)
    server.nonsense = request.param  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_server_that_answers_nonsense_is_told_once(nonsense: str, chain: Path, tries: list[Path]) -> None:
    notes = Notes()
    with live_mirror(Store(nonsense), notes.note, chain):
        until(lambda: len(tries) > 2)
    assert len(notes.lines) == 2
    assert notes.lines[0].startswith(f"MLflow ({nonsense}): ")


def test_the_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")  # on by default
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stage" / SYSTEM
    path.parent.mkdir()
    path.write_text(
        '{"step": 0, "time": 5, "values": {"system/cpu": 1.0}}\n{"step": 1, "ti'
    )  # A kill left half a line.
    with sampling(path.parent):
        until(lambda: len(list(read_reports(path))) > 2)
    reports = list(read_reports(path))
    assert [report.step for report in reports] == list(range(len(reports)))
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= reports[1].values.keys()
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage"]  # MLflow's own sampler would open a store here.
