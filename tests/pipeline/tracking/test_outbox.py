"""Log entries reach MLflow once and in order, whatever happens to the store or the run in between."""

import errno
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kills import KILLED, attempt, differences, exit_code, history, stage_runs
from mini import ENVIRONMENT, Notes, mini_chain, run_chain

from pipeline.chain.chain import Chain
from pipeline.tracking import outbox as outbox_module
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import Store, find_run

STEPS = range(1, 41)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "does not come about"
        time.sleep(0.05)


class Server:
    """`mlflow server` on a store, which can be stopped and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        log = (self.folder / "server.log").open("a")
        quick = {**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # ten processes less
        self.process = subprocess.Popen(command, env=quick, stdout=log, stderr=log, start_new_session=True)
        until(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Line:
    """The way to a server, one request a connection: closed, slow, or one that loses answers."""

    def __init__(self, port: int):
        self.target, self.open, self.delay, self.lost_every = port, True, 0.0, 0
        self.answers = self.lost = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(near,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        with near:
            if not self.open:
                return
            with socket.create_connection(("127.0.0.1", self.target)) as far:
                threading.Thread(target=self._requests, args=(near, far), daemon=True).start()
                while answer := far.recv(65536):
                    self.answers += 1
                    time.sleep(self.delay)
                    if not self.open:
                        return
                    if self.lost_every and self.answers % self.lost_every == 0:
                        self.lost += 1
                        return
                    near.sendall(answer)

    def _requests(self, near: socket.socket, far: socket.socket) -> None:
        try:
            while request := near.recv(65536):
                far.sendall(request)
        except OSError:
            pass


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "LONGEST_PAUSE", 1.0)


@pytest.fixture(scope="module")
def server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store / "mlflow.db", folder)
    server = Server(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def line(server: Server) -> Iterator[Line]:
    line = Line(server.port)
    yield line
    line.listener.close()


def say_all(outbox: Outbox, key: str) -> None:
    """Log something of every kind, and a metric at every step."""
    run = outbox.run(key, "a run", tags={"hpcm.recipe": "mini"})
    run.parameters({"seed": 0, "schedule": [{"name": "scratch", "steps": 6}]})
    for step in STEPS:
        run.metrics({"loss": 1 / step}, step)
    run.end("FINISHED")


def losses(store: Store, key: str) -> list[int]:
    """The steps in the store, each as often as the store has it."""
    client = store.client()
    run_id = find_run(client, key)
    return sorted(metric.step for metric in client.get_metric_history(run_id, "loss")) if run_id else []


def test_everything_arrives_and_nothing_is_left(runs: Path, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox", Store.default(runs))
    say_all(outbox, "k")
    outbox.close(60)
    client = Store.default(runs).client()
    run = client.get_run(find_run(client, "k"))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "schedule.scratch.name": "scratch", "schedule.scratch.steps": "6"}
    assert losses(Store.default(runs), "k") == list(STEPS)
    assert not (tmp_path / "outbox").exists()


def test_a_locked_database_is_waited_for_by_the_outbox_alone(runs: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(runs / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        outbox = Outbox(tmp_path / "outbox", Store.default(runs))
        say_all(outbox, "k")
        assert outbox.waiting == len(STEPS) + 3
        other.execute("ROLLBACK")
    outbox.close(60)
    assert losses(Store.default(runs), "k") == list(STEPS)


def test_what_a_kill_left_half_done_is_done_once(runs: Path, tmp_path: Path) -> None:
    store, folder = Store.default(runs), tmp_path / "outbox"
    outbox = Outbox(folder, store)
    say_all(outbox, "k")
    until(lambda: outbox.waiting == 0)
    journal = (folder / "journal.jsonl").read_bytes()
    outbox.close(60)
    folder.mkdir()
    # Sent, but not noted as sent; the last line torn; and the run says again what it said since its last state.
    (folder / "journal.jsonl").write_bytes(journal + b'{"run": "k", "action": "met')
    (folder / "sent").write_text(str(journal.index(b"\n") + 1))
    again = Outbox(folder, store)
    say_all(again, "k")
    again.close(60)
    assert losses(store, "k") == list(STEPS)
    # The journal is gone, and the run says it once more.
    third = Outbox(folder, store)
    say_all(third, "k")
    third.close(60)
    assert losses(store, "k") == list(STEPS)
    assert len(store.client().search_runs([store.client().get_experiment_by_name("hpcm").experiment_id])) == 1


def test_what_mlflow_refuses_is_told_and_does_not_stop_the_rest(runs: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    outbox = Outbox(tmp_path / "outbox", Store.default(runs), notes.append)
    outbox.run("k", "a run").metrics({"a\nb": 1.0}, 1)
    outbox.run("k", "a run").metrics({"loss": 1.0}, 2)
    outbox.close(60)
    assert any("MLflow rejected the metrics of run k" in note for note in notes)
    assert losses(Store.default(runs), "k") == [2]


def test_a_store_that_is_none_refuses_nothing(tmp_path: Path) -> None:
    notes: list[str] = []
    outbox = Outbox(tmp_path / "outbox", Store("nonsense://nowhere"), notes.append)
    outbox.run("k", "a run").metrics({"loss": 1.0}, 1)
    until(lambda: bool(notes))
    outbox.close(3)
    assert outbox.waiting == 2
    assert len(notes) == 2
    assert notes[0].startswith("cannot reach MLflow (")
    assert notes[1].startswith("2 log entries are not sent yet (")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Files with a name in this set cannot be written, as on a full disk."""
    names = {"sent.partial"}
    opened = Path.open

    def open_file(path: Path, *arguments: object, **options: object) -> object:
        if path.name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_file)
    return names


def test_a_full_disk_is_waited_for(runs: Path, tmp_path: Path, full_disk: set[str]) -> None:
    notes: list[str] = []
    outbox = Outbox(tmp_path / "outbox", Store.default(runs), notes.append)
    say_all(outbox, "k")
    until(lambda: bool(notes))
    assert "sent: cannot be written: No space left on device" in notes[0]
    full_disk.clear()
    assert outbox.close(60)
    assert losses(Store.default(runs), "k") == list(STEPS)


def test_what_a_full_disk_keeps_from_being_sent_stays(runs: Path, tmp_path: Path, full_disk: set[str]) -> None:
    notes: list[str] = []
    outbox = Outbox(tmp_path / "outbox", Store.default(runs), notes.append)
    say_all(outbox, "k")
    until(lambda: bool(notes))
    assert not outbox.close(1)
    assert f"{len(STEPS) + 3} log entries are not sent yet" in notes[-1]
    full_disk.clear()
    assert Outbox(tmp_path / "outbox", Store.default(runs)).close(60)
    assert losses(Store.default(runs), "k") == list(STEPS)


def test_a_thread_that_died_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "_deliver", lambda self: None)
    outbox = Outbox(tmp_path / "outbox", Store("nonsense://nowhere"))
    outbox.run("k", "a run")
    assert not outbox.close()
    assert outbox.waiting == 1


def test_a_journal_that_was_emptied_in_use_is_told(runs: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    outbox = Outbox(tmp_path / "outbox", Store.default(runs), notes.append)
    outbox.run("k", "a run")
    until(lambda: outbox.waiting == 0)
    os.truncate(outbox.path, 0)
    outbox.run("k", "a run")
    until(lambda: bool(notes))
    assert "journal.jsonl: shortened or deleted while it was in use" in notes[0]
    assert not outbox.close(1)


def test_an_artifact_is_kept_as_it_was(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    (folder / "reconstructions").mkdir(parents=True)
    (folder / "ledger.json").write_text("[]")
    (folder / "reconstructions" / "coffee.png").write_bytes(b"png")
    with closing(sqlite3.connect(runs / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        outbox = Outbox(tmp_path / "outbox", Store.default(runs))
        run = outbox.run("k", "a run")
        run.artifact(folder / "ledger.json")
        run.artifact(folder / "reconstructions", "reconstructions")
        shutil.rmtree(folder)
        other.execute("ROLLBACK")
    outbox.close(60)
    client = Store.default(runs).client()
    run_id = find_run(client, "k")
    assert [entry.path for entry in client.list_artifacts(run_id)] == ["ledger.json", "reconstructions"]
    assert [entry.path for entry in client.list_artifacts(run_id, "reconstructions")] == ["reconstructions/coffee.png"]


def test_a_server_that_goes_away_and_comes_back(line: Line, server: Server, tmp_path: Path) -> None:
    notes: list[str] = []
    line.open = False
    outbox = Outbox(tmp_path / "outbox", Store(line.uri), notes.append)
    run = outbox.run("away", "a run")
    for step in STEPS:
        run.metrics({"loss": 1 / step}, step)
        if step == 10:
            until(lambda: bool(notes))
            assert "cannot reach MLflow" in notes[0]
        if step in (10, 30):
            line.open = True
            until(lambda: outbox.waiting == 0)
        if step == 20:
            line.open = False
    outbox.close(60)
    assert losses(Store(server.uri), "away") == list(STEPS)
    assert "log entries reach MLflow again" in notes


def test_a_slow_server_is_not_waited_for(line: Line, server: Server, tmp_path: Path) -> None:
    line.delay = 0.5
    outbox = Outbox(tmp_path / "outbox", Store(line.uri))
    say_all(outbox, "slow")
    assert outbox.waiting > len(STEPS) / 2  # All is said, and the server has hardly begun.
    line.delay = 0
    outbox.close(120)
    assert losses(Store(server.uri), "slow") == list(STEPS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_that_are_lost_make_nothing_appear_twice(line: Line, server: Server, tmp_path: Path) -> None:
    line.lost_every = 19
    outbox = Outbox(tmp_path / "outbox", Store(line.uri))
    say_all(outbox, "lost")
    outbox.close(600)
    assert line.lost
    assert losses(Store(server.uri), "lost") == list(STEPS)
    client = Store(server.uri).client()
    experiment = client.get_experiment_by_name("hpcm")
    assert len(client.search_runs([experiment.experiment_id], "tags.`hpcm.key` = 'lost'")) == 1


def test_a_killed_run_without_a_server_is_sent_by_the_next(
    line: Line, server: Server, finished: tuple[Chain, Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
    assert exit_code(attempt(tmp_path, "baseline", [], {**away, "HPCM_FAULT": "step:4"})) == KILLED
    chain = mini_chain(tmp_path, "baseline")
    assert (chain.folder / "outbox" / "journal.jsonl").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run_chain(chain)
    client, found = stage_runs(chain)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    other_client, expected = stage_runs(finished[0])
    (run,) = found["baseline"]
    assert run.info.status == "FINISHED"
    assert history(client, run) == history(other_client, expected["baseline"][0])
    assert not (chain.folder / "outbox").exists()


@pytest.mark.slow
def test_a_chain_goes_on_while_its_server_is_killed_and_restarted(
    empty_store: Path, finished: tuple[Chain, Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store / "mlflow.db", tmp_path)
    server = Server(tmp_path)  # Not started: away before the run.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)

    class Trouble(Notes):
        def note(self, line: str) -> None:
            super().note(line)
            if line.startswith("phase1: "):
                server.start()
            if line.startswith("phase2: "):
                server.stop()
            if line.startswith("phase4: "):
                server.start()

    chain, notes = mini_chain(tmp_path / "runs", "phase4"), Trouble()
    run_chain(chain, notes)
    assert any("cannot reach MLflow" in line for line in notes.lines)
    client, found = stage_runs(chain)
    held = {name: [(run.info.status, history(client, run)) for run in runs] for name, runs in found.items()}
    server.stop()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    other_client, expected = stage_runs(finished[0])
    assert held == {name: [("FINISHED", history(other_client, run)) for run in runs] for name, runs in expected.items()}
    assert all(task.checkpoint.exists() for task in chain.tasks)
    assert differences(finished[0], finished[0]) == []
