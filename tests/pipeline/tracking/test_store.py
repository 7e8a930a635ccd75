"""The store in a folder of runs: made once, found after the folder was moved, shown without passwords."""

import shutil
import sqlite3
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from mini import Hpcm
from pages import twice_at_once

from pipeline.records.record import StageRecord
from pipeline.tracking import store as store_module
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import KEY, Store, StoreError, brief, experiment_id, find_run, without_password


def test_of_two_first_runs_neither_replaces_the_others_database(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, kept, together = tmp_path / "runs", [], threading.Barrier(2)

    def create_slowly(path: Path) -> None:
        time.sleep(0.2)  # The other one comes meanwhile.
        shutil.copy(empty_store / "mlflow.db", path)

    monkeypatch.setattr(store_module, "_create_tables", create_slowly)

    def begin() -> None:
        together.wait()
        client = Store.default(runs).client()
        kept.append(client.create_run(experiment_id(client)).info.run_id)

    twice_at_once(begin)
    client = Store.default(runs).client()
    assert sorted(run.info.run_id for run in client.search_runs([experiment_id(client)])) == sorted(kept)
    assert len(kept) == 2


def test_of_two_runs_with_one_key_the_older_is_continued(fresh: Store) -> None:
    client = fresh.client()
    made = [client.create_run(experiment_id(client), time, {"hpcm.key": "k"}).info.run_id for time in (2, 1)]
    assert find_run(client, "k") == made[1]


def keep_a_file(runs: Path, key: str) -> None:
    store = Store.default(runs)
    client = store.client()
    run_id = client.create_run(experiment_id(client), tags={KEY: key}).info.run_id
    (runs / "note.txt").write_text(key)
    store.artifacts(client, run_id).log_artifact(str(runs / "note.txt"))


def kept_file(runs: Path, key: str) -> Path:
    store = Store.default(runs)
    client = store.client()
    return Path(store.artifacts(client, find_run(client, key)).artifact_dir) / "note.txt"


@pytest.mark.parametrize("name", ["moved", "a?b#c%25 d%e"])
def test_a_moved_or_copied_folder_has_its_own_artifacts(name: str, stored_runs: Path, tmp_path: Path) -> None:
    keep_a_file(stored_runs, "first")
    copied = tmp_path / name / "runs"
    shutil.copytree(stored_runs, copied)
    keep_a_file(copied, "second")
    for key in ("first", "second"):
        path = kept_file(copied, key)
        assert path.read_text() == key
        assert path.is_relative_to(copied)
    # MLflow's own pages go by the address in the database.
    client = Store.default(copied).client()
    assert [file.path for file in client.list_artifacts(find_run(client, "first"))] == ["note.txt"]
    assert client.get_run(find_run(client, "first")).info.artifact_uri.startswith(copied.as_uri())
    assert kept_file(stored_runs, "first").is_relative_to(stored_runs)
    assert find_run(Store.default(stored_runs).client(), "second") is None
    assert [path.name for path in (tmp_path / name).iterdir()] == ["runs"]


def test_a_folder_that_may_only_be_read_is_read(stored_runs: Path, tmp_path: Path) -> None:
    keep_a_file(stored_runs, "first")
    shown = tmp_path / "shown"
    shown.mkdir()
    if subprocess.run(["mount", "--bind", "-o", "ro", stored_runs, shown], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        assert kept_file(shown, "first") == shown / kept_file(stored_runs, "first").relative_to(stored_runs)
    finally:
        subprocess.run(["umount", "--lazy", shown], check=True)  # MLflow keeps its connections open.


def test_a_strangers_database_does_not_say_where_files_are_written(copied: tuple[Path, Store], tmp_path: Path) -> None:
    folder, store = copied
    outside, record = tmp_path / "outside", StageRecord.read(folder / "phase1")
    outside.mkdir()
    client = store.client()
    run_id = find_run(client, record.key)
    own = folder.parents[1] / "mlartifacts" / str(run_id) / "artifacts"
    (own / "ledger.json").unlink()
    with closing(sqlite3.connect(folder.parents[1] / "mlflow.db")) as database, database:
        database.execute("UPDATE runs SET artifact_uri = ?", (outside.as_uri(),))
    Mirror(store).chain(folder, working=False)
    assert (own / "ledger.json").exists()

    own.rename(tmp_path / "elsewhere")
    own.symlink_to(outside)
    with pytest.raises(StoreError, match=f"{own}: this is a link, and links are not followed"):
        Mirror(store).chain(folder, working=False)

    with closing(sqlite3.connect(folder.parents[1] / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", (outside.as_uri(),))
    with pytest.raises(StoreError, match=r"its artifacts are kept outside the folder of runs, in file:.*/outside"):
        Mirror(store).chain(folder, working=False)
    assert list(outside.iterdir()) == []

    (outside / "mlflow.db").symlink_to(folder.parents[1] / "mlflow.db")
    with pytest.raises(StoreError, match=f"{outside / 'mlflow.db'}: this is a link"):
        Store.default(outside).client()


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("https://me:s3cret@host:5000/path?token=s3cret")
    assert store.shown == "https://***@host:5000/path"
    error = RuntimeError("API request to http://me:s3cret@host/api failed; postgresql+x://u:s3cret@h/d?password=s3cret")
    assert "s3cret" not in brief(error)
    assert without_password("sqlite:////tmp/a@b/mlflow.db") == "sqlite:////tmp/a@b/mlflow.db"
    for uri in (
        "http://me:s3/cret@host",
        "http://me:s3@cret@host",
        "http://me:s3?cret@host",
        "postgresql://u:s3#cret@h/d",
        "mysql+pymysql://u:s3 cret@h/d",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(StoreError, match="in a password write @") as raised:
            Store.default(Path("runs"))
        assert "cret" not in str(raised.value)


@pytest.mark.parametrize("command", ["sync", "ui", "audit --mlflow", "info models:/codec@alias"])
def test_no_command_prints_a_password(
    command: str, copied: tuple[Path, Store], monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:9")
    printed = hpcm(*command.split(), "--runs", copied[0].parents[1], code=1)
    assert "http://***@127.0.0.1:9" in printed.out + printed.err
    assert "s3cret" not in printed.out + printed.err
