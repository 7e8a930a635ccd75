"""Difficult journals: from a stranger, beside links, or with entries that no store accepts."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.commands import sync
from pipeline.commands.main import app
from pipeline.common.files import FileError
from pipeline.tracking import outbox as outbox_module
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import Store, StoreError, experiment_id, find_run
from pipeline.tracking.stored_run import open_run


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "LONGEST_PAUSE", 0.2)


LONG = 300 * "x"
OPEN = {"run": "k", "action": "open", "time": 1, "arguments": {"name": "a run", "parent": None, "tags": {}}}


def artifact(name: str) -> dict[str, object]:
    return {"run": "k", "action": "artifact", "time": 2, "arguments": {"name": name, "folder": None}}


def sent(runs: Path, folder: Path, *entries: object) -> list[str]:
    """Send a journal with these entries. Returns the notes."""
    notes: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in entries]
    (folder / "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    assert Outbox(folder, Store.default(runs), notes.append).close(60)
    return notes


def test_a_strangers_journal_reads_and_deletes_nothing_outside_its_folder(runs: Path, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "chain" / "outbox"
    victim.mkdir()
    (victim / "secret").write_text("mine")
    (folder / "files" / "1").mkdir(parents=True)
    (folder / "files" / "1" / "secret").symlink_to(victim / "secret")
    (folder / "files" / "2").symlink_to(victim)
    (folder / "files" / "3" / "inside").mkdir(parents=True)
    (folder / "files" / "3" / "inside" / "secret").symlink_to(victim / "secret")
    (folder / "files" / "5").mkdir()
    os.mkfifo(folder / "files" / "5" / "pipe")
    names = [str(victim / "secret"), "../../../victim/secret", "1/secret", "2/secret", "3/inside", "..", "", "4/gone"]
    names += ["5/pipe"]
    notes = sent(runs, folder, OPEN, *map(artifact, names))
    assert (victim / "secret").read_text() == "mine"
    client = Store.default(runs).client()
    assert client.list_artifacts(find_run(client, "k")) == []
    assert len(notes) == len(names)
    assert all("cannot be sent" in note for note in notes)
    assert (folder / "set-aside.jsonl").read_text().count("\n") == len(names)


@pytest.mark.parametrize("name", ["journal.jsonl", "sent", "files", "set-aside.jsonl"])
def test_links_in_the_place_of_an_outboxs_files_are_not_followed(name: str, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    folder.mkdir()
    (tmp_path / "victim").mkdir()
    (folder / name).symlink_to(tmp_path / "victim")
    with pytest.raises(FileError, match=rf"{name}: this is a link, and links are not followed"):
        Outbox(folder, Store.default(runs))


def test_a_link_beside_the_note_of_what_was_sent_is_not_written_through(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "outbox" / "sent.partial").symlink_to(tmp_path / "victim")
    sent(runs, tmp_path / "outbox", OPEN)
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize(
    "poison",
    [
        b'{"run": "k", "action": "tags", "time": 2, "arguments": {"values": {"a": "\\udcff"}}}',
        {"run": "k", "action": "__class__", "time": 2, "arguments": {}},
        {"run": "k", "action": "metrics", "time": 2, "arguments": {"values": {"loss": "much"}, "step": 1}},
        {"run": "k", "action": "metrics", "time": 2, "arguments": {}},
        {"run": "k", "action": "metrics", "time": 2, "arguments": {"values": {"loss": 0.0}, "step": 2**70}},
        {"run": "k", "action": "end", "time": 2**70, "arguments": {"state": "FAILED"}},
        {"run": "k", "action": "table", "time": 2, "arguments": {"path": "\0.json", "columns": [], "rows": []}},
        {"run": "k", "action": "table", "time": 2, "arguments": {"path": f"{LONG}.json", "columns": [], "rows": []}},
        {"run": "l", "action": "open", "time": 2, "arguments": {"name": 5}},
        {"run": "stranger", "action": "tags", "time": 2, "arguments": {"values": {}}},
        {"run": "k'", "action": "open", "time": 2, "arguments": {"name": "x", "parent": None, "tags": {}}},
        b"\xff\xfe{", b"5", b"\0\0",
    ],
)  # fmt: skip
def test_what_no_store_can_take_is_kept_aside_and_the_rest_is_sent(poison: object, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    metric = {"run": "k", "action": "metrics", "time": 3, "arguments": {"values": {"loss": 1.0}, "step": 2}}
    notes = sent(runs, folder, OPEN, poison, metric)
    assert any("set-aside.jsonl, and the other entries are sent" in note for note in notes)
    line = poison if isinstance(poison, bytes) else json.dumps(poison).encode()
    assert (folder / "set-aside.jsonl").read_bytes() == line + b"\n"
    assert len([note for note in notes if "set-aside.jsonl" in note]) == 1
    assert not (folder / "journal.jsonl").exists()
    client = Store.default(runs).client()
    assert client.get_run(find_run(client, "k")).data.metrics == {"loss": 1.0}


def test_files_that_cannot_be_what_the_entry_says_are_kept_aside(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    (folder / "files" / "1").mkdir(parents=True)
    # Pillow would start Ghostscript for it.
    (folder / "files" / "1" / "picture.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    facts = dict.fromkeys(("registered", "stage", "digest", "dataset", "dataset_digest"), "x")
    entries = [
        {"action": "image", "arguments": {"name": "1/picture.png", "key": "a", "step": 1}},
        {"action": "model", "arguments": {"name": "1/gone", "facts": {**facts, "metrics": {}, "step": 1, "loss": 1.0}}},
    ]
    notes = sent(runs, folder, OPEN, *({"run": "k", "time": 2, **entry} for entry in entries))
    assert [note.split(":")[0] for note in notes] == [
        "the image of run k cannot be sent", "the model of run k cannot be sent",
    ]  # fmt: skip


def test_a_strangers_database_does_not_say_where_files_are_written(runs: Path, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "outbox"
    (folder / "files" / "1").mkdir(parents=True)
    (folder / "files" / "1" / "note.txt").write_text("a note")
    victim.mkdir()
    store = Store.default(runs)
    run_id = open_run(store, store.client(), "k", "a run", None, {}, 1).run_id
    with closing(sqlite3.connect(runs / "mlflow.db")) as database, database:
        database.execute("UPDATE runs SET artifact_uri = ?", (victim.as_uri(),))
    sent(runs, folder, OPEN, artifact("1/note.txt"))
    own = runs / "mlartifacts" / run_id / "artifacts"
    assert [path.name for path in own.iterdir()] == ["note.txt"]

    own.rename(tmp_path / "elsewhere")
    own.symlink_to(victim)
    notes = sent(runs, folder, OPEN, artifact("1/note.txt"))
    assert all(f"{own}: this is a link, and links are not followed" in note for note in notes)
    assert list(victim.iterdir()) == []

    with closing(sqlite3.connect(runs / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", (victim.as_uri(),))
    with pytest.raises(StoreError, match=r"its artifacts are kept outside the folder of runs, in file:.*/victim"):
        store.client()


def test_a_clock_that_was_set_back_loses_no_values(runs: Path, tmp_path: Path) -> None:
    samples = [
        {"run": "k", "action": "samples", "time": time, "arguments": {"values": {"cpu": value}, "repeated": True}}
        for time, value in ((5, 1.0), (3, 2.0))
    ]
    for _ in range(2):  # A second delivery changes nothing.
        sent(runs, tmp_path / "outbox", OPEN, *samples)
    client = Store.default(runs).client()
    logged = client.get_metric_history(find_run(client, "k"), "cpu")
    assert sorted((metric.step, metric.value) for metric in logged) == [(0, 1.0), (1, 2.0)]


def test_names_that_are_not_utf8_are_logged_readably(runs: Path, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox", Store.default(runs))
    name = os.fsdecode(b"b\xff.txt")
    (tmp_path / name).write_text("x")
    run = outbox.run("k", "a run")
    run.tags({"name": name})
    run.artifact(tmp_path / name)
    assert outbox.close(60)
    client = Store.default(runs).client()
    run_id = find_run(client, "k")
    assert client.get_run(run_id).data.tags["name"] == "b?.txt"
    assert [file.path for file in client.list_artifacts(run_id)] == ["b\\xff.txt"]


def test_what_else_lies_in_the_folder_stays(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "checkpoint.safetensors").write_text("a stage of this name")
    sent(runs, tmp_path / "outbox", OPEN)
    assert [path.name for path in (tmp_path / "outbox").iterdir()] == ["checkpoint.safetensors"]


def test_an_experiment_in_the_trash_counts_as_nothing_delivered(runs: Path, tmp_path: Path) -> None:
    client, notes = Store.default(runs).client(), []
    experiment = experiment_id(client)
    client.delete_experiment(experiment)
    outbox = Outbox(tmp_path / "outbox", Store.default(runs), notes.append)
    outbox.run("k", "a run").metrics({"loss": 1.0}, 1)
    assert not outbox.close(1.5)
    assert outbox.waiting == 2
    assert "mlflow experiments restore" in notes[0]
    client.restore_experiment(experiment)
    assert Outbox(tmp_path / "outbox", Store.default(runs)).close(60)
    assert client.get_run(find_run(client, "k")).data.metrics == {"loss": 1.0}


class _Yes(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PATCH = _answer

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def yes_man() -> Iterator[str]:
    """Address of a server that answers `{}` to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Yes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_server_that_says_yes_to_everything_has_taken_nothing(
    yes_man: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts, client = [], Store.client
    monkeypatch.setattr(Store, "client", lambda store: (attempts.append(store), client(store))[1])
    outbox = Outbox(tmp_path / "outbox", Store(yes_man))
    outbox.run("k", "a run").metrics({"loss": 1.0}, 1)
    while len(attempts) < 4:
        time.sleep(0.05)
    assert not outbox.close(0)
    assert outbox.waiting == 2


def test_what_the_store_does_not_show_is_sent_again(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    logged, lost = MlflowClient.log_batch, []

    def lose_the_first(client: MlflowClient, run_id: str, **values: object) -> None:
        if "metrics" in values and not lost:
            lost.append(values)
        else:
            logged(client, run_id, **values)

    monkeypatch.setattr(MlflowClient, "log_batch", lose_the_first)
    outbox = Outbox(tmp_path / "outbox", Store.default(runs))
    outbox.run("k", "a run").metrics({"loss": 1.0, "accuracy": float("nan")}, 1)
    assert outbox.close(60)
    assert len(lost) == 1
    client = Store.default(runs).client()
    assert client.get_run(find_run(client, "k")).data.metrics["loss"] == 1.0


def test_sync_prints_no_password(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:9")
    monkeypatch.setattr(sync, "PATIENCE", 1.0)
    folder = runs / "mini" / "lmbda-0.013" / "outbox"
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").write_text(json.dumps(OPEN) + "\n")
    done = CliRunner().invoke(app, ["sync", "--runs", str(runs)])
    assert done.exit_code == 1
    assert "1 log entries to send to http://***@127.0.0.1:9" in done.output
    assert "s3cret" not in done.output


def test_sync_exits_1_if_it_set_an_entry_aside(runs: Path) -> None:
    folder = runs / "mini" / "lmbda-0.013" / "outbox"
    folder.mkdir(parents=True)
    for entries, exit_code in (([OPEN, artifact("4/gone")], 1), ([OPEN], 0)):
        (folder / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        done = CliRunner().invoke(app, ["sync", "--runs", str(runs)])
        assert done.exit_code == exit_code, done.output
        assert not (folder / "journal.jsonl").exists()
