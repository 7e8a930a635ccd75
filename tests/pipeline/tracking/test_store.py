"""The store in a folder of runs: made once, found after the folder was moved, shown without passwords."""

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pipeline.tracking import store as store_module
from pipeline.tracking.store import Store, brief, find_run, without_password


def test_of_two_first_runs_neither_replaces_the_others_database(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, runs, kept = threading.Barrier(2), tmp_path / "runs", []

    def make_slowly(path: Path) -> None:
        if path.exists():
            return
        time.sleep(0.3)  # The other one comes meanwhile.
        partial = path.with_name(f"{threading.get_ident()}.partial")
        shutil.copy(empty_store / "mlflow.db", partial)
        partial.replace(path)

    def begin(name: str) -> None:
        making.wait()
        client = Store.default(runs).client()
        kept.append(client.create_run(store_module.experiment_id(client), tags={"name": name}).info.run_id)

    monkeypatch.setattr(store_module, "make_database", make_slowly)
    threads = [threading.Thread(target=begin, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = Store.default(runs).client()
    found = client.search_runs([store_module.experiment_id(client)])
    assert sorted(run.info.run_id for run in found) == sorted(kept)
    assert len(kept) == 2


def keep_a_file(runs: Path, key: str) -> None:
    store = Store.default(runs)
    client = store.client()
    run_id = client.create_run(store_module.experiment_id(client), tags={store_module.KEY: key}).info.run_id
    (runs / "note.txt").write_text(key)
    store.artifacts(client, run_id).log_artifact(str(runs / "note.txt"))


def kept_file(runs: Path, key: str) -> Path:
    store = Store.default(runs)
    client = store.client()
    return Path(store.artifacts(client, find_run(client, key)).artifact_dir) / "note.txt"


@pytest.mark.parametrize("name", ["moved", "a?b#c%25 d%e"])
def test_a_moved_or_copied_folder_has_its_own_artifacts(name: str, runs: Path, tmp_path: Path) -> None:
    keep_a_file(runs, "first")
    copied = tmp_path / name / "runs"
    shutil.copytree(runs, copied)
    keep_a_file(copied, "second")
    for key in ("first", "second"):
        path = kept_file(copied, key)
        assert path.read_text() == key
        assert path.is_relative_to(copied)
    # MLflow's own pages go by the address in the database.
    client = Store.default(copied).client()
    assert [file.path for file in client.list_artifacts(find_run(client, "first"))] == ["note.txt"]
    assert client.get_run(find_run(client, "first")).info.artifact_uri.startswith(copied.as_uri())
    assert kept_file(runs, "first").is_relative_to(runs)
    assert find_run(Store.default(runs).client(), "second") is None
    assert [path.name for path in (tmp_path / name).iterdir()] == ["runs"]


def test_a_folder_that_may_only_be_read_is_read(runs: Path, tmp_path: Path) -> None:
    keep_a_file(runs, "first")
    shown = tmp_path / "shown"
    shown.mkdir()
    if subprocess.run(["mount", "--bind", "-o", "ro", runs, shown], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        assert kept_file(shown, "first") == shown / kept_file(runs, "first").relative_to(runs)
    finally:
        subprocess.run(["umount", "--lazy", shown], check=True)  # MLflow keeps its connections open.


def test_passwords_are_not_shown() -> None:
    store = Store("https://me:s3cret@host:5000/path?token=s3cret")
    assert store.shown == "https://***@host:5000/path"
    error = RuntimeError("API request to http://me:s3cret@host/api failed; postgresql://u:s3cret@h/db?password=s3cret")
    assert "s3cret" not in brief(error)
    assert without_password("sqlite:////tmp/a@b/mlflow.db") == "sqlite:////tmp/a@b/mlflow.db"
