"""MLflow as a mirror of folders: complete, repeatable, and never in the way of a training."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mini import Notes
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from pipeline.chain.chain import Chain
from pipeline.common.errors import Interrupted
from pipeline.records import metrics
from pipeline.records.chains import read_chain
from pipeline.records.metrics import MetricsLog, read_history
from pipeline.tracking import live
from pipeline.tracking.live import LiveMirror
from pipeline.tracking.mirror import Mirror, differences
from pipeline.tracking.store import Store, StoreError, experiment_id, find_run

MODEL = "hpcm-mini-lmbda-0.013"
WRITING = [
    *((MlflowClient, name) for name in (
        "create_run", "log_batch", "log_inputs", "log_outputs", "set_terminated", "create_logged_model",
        "finalize_logged_model", "create_registered_model", "create_model_version", "set_registered_model_alias",
    )),
    *((LocalArtifactRepository, name) for name in ("log_artifact", "log_artifacts")),
]  # fmt: skip
"""All calls by which a mirror changes a store."""


def shown(store: Store) -> dict[str, Any]:
    """Everything that MLflow's pages show, without the ids that MLflow chooses."""
    client = store.client()
    runs = list(client.search_runs([experiment_id(client)]))
    names = {run.info.run_id: run.info.run_name for run in runs}
    found: dict[str, Any] = {}
    for run in runs:
        tags = dict(run.data.tags)
        tags["mlflow.parentRunId"] = names.get(tags.get("mlflow.parentRunId", ""), "")
        histories = {
            key: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        repository = store.artifacts(client, run.info.run_id)
        folders = [None, "reconstructions", "images"]
        artifacts = sorted(file.path for folder in folders for file in repository.list_artifacts(folder))
        data = sorted((entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs)
        assert run.info.run_name not in found, "two runs of one stage"
        found[run.info.run_name] = (
            run.info.status, run.info.start_time, run.info.end_time, run.data.params, tags, histories, artifacts, data
        )  # fmt: skip
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name = '{model.name}'")
        rows = [(int(version.version), names[version.run_id], version.tags) for version in versions]
        found[model.name] = (sorted(rows, key=lambda row: row[0]), dict(model.aliases))
    models = client.search_logged_models([experiment_id(client)])
    found["logged models"] = sorted(
        (model.name, str(model.status), len(model.metrics or ()), names[model.source_run_id]) for model in models
    )
    return found


@pytest.fixture(scope="module")
def chain(finished: tuple[Chain, Notes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished chain to Phase 1."""
    runs = tmp_path_factory.mktemp("mirrored")
    folder = runs / "mini" / finished[0].folder.name
    for name in ("baseline", "phase1"):
        shutil.copytree(finished[0].folder / name, folder / name)
    shutil.copy(finished[0].folder / "chain.json", folder)
    log = MetricsLog(folder / "phase1" / metrics.SYSTEM)
    for number in range(2):
        log.append({"system/cpu_utilization_percentage": 50.0 + number}, number)
    return folder


@pytest.fixture(scope="module")
def store(chain: Path, empty_store: Path) -> Store:
    """A store to which the chain was mirrored; not to be changed."""
    shutil.copytree(empty_store, chain.parents[1], dirs_exist_ok=True)
    found = Store.default(chain.parents[1])
    Mirror(found).chain(chain, working=False)
    return found


@pytest.fixture
def fresh(tmp_path: Path, empty_store: Path) -> Store:
    """An empty store."""
    shutil.copytree(empty_store, tmp_path / "store")
    return Store.default(tmp_path / "store")


@pytest.fixture
def copied(chain: Path, store: Store, tmp_path: Path) -> tuple[Path, Store]:
    """A copy of the chain and its store, which may be changed."""
    shutil.copytree(chain.parents[1], tmp_path / "copied")
    return tmp_path / "copied" / "mini" / chain.name, Store.default(tmp_path / "copied")


def test_mlflow_shows_what_the_folders_say(chain: Path, store: Store) -> None:
    found = shown(store)
    assert sorted(found) == [MODEL, "logged models", "mini baseline", "mini phase1", "mini λ=0.013"]
    status, began, ended, parameters, tags, histories, artifacts, data = found["mini phase1"]
    record = read_chain(chain).published["phase1"].record
    assert (status, began, ended) == ("FINISHED", record.began, record.ended)
    assert parameters["schedule.frozen.handover"] == "4"
    assert parameters["codec.attn_s3.kind"] == "rwkv"
    assert tags["mlflow.parentRunId"] == "mini λ=0.013"
    assert tags["hpcm.checkpoint"] == "mini/lmbda-0.013/phase1/checkpoint.safetensors"
    assert tags["hpcm.acceptance"].startswith("accepted")
    assert "Replaces `attn_s3` (cross-attention to rwkv)" in tags["mlflow.note.content"]
    assert {key: [(step, value) for step, value, _ in values] for key, values in histories.items()} == {
        **read_history(chain / "phase1"), "system/cpu_utilization_percentage": [(0, 50.0), (1, 51.0)]
    }  # fmt: skip
    assert {"checkpoint.safetensors", "record.json", "stage.yaml", "ledger.json", "evaluation.json", "images.json",
            "metrics.jsonl", "rate-distortion.png"} <= set(artifacts)  # fmt: skip
    pictures = [path for path in artifacts if path.startswith("images/")]
    assert [Path(path).suffix for path in pictures] == [".webp", ".png"]
    assert data == sorted({(images.name, images.digest[:36]) for images in (record.train_images, record.val_images)})
    versions, aliases = found[MODEL]
    assert [(number, run) for number, run, _ in versions] == [(1, "mini baseline"), (2, "mini phase1")]
    assert aliases.keys() == {"baseline", "phase1", "best"}
    assert [row[:2] for row in found["logged models"]] == [("baseline", "READY"), ("phase1", "READY")]
    chain_histories = found["mini λ=0.013"][5]
    assert record.quality is not None
    assert [value for _, value, _ in chain_histories["phase1/bpp"]] == [record.quality.bpp]


def test_a_repeated_mirror_changes_nothing(copied: tuple[Path, Store], store: Store) -> None:
    Mirror(copied[1]).chain(copied[0], working=False)
    assert shown(copied[1]) == shown(store)


def test_an_empty_store_gets_a_copy_of_everything(chain: Path, store: Store, fresh: Store) -> None:
    Mirror(fresh).chain(chain, working=False)
    assert shown(fresh) == shown(store)


def test_mirrors_that_are_killed_between_any_two_calls_leave_nothing_twice(
    chain: Path, store: Store, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: set[str] = set()

    def then_killed(call: Any) -> Any:
        def killed(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            if call.__name__ == "log_artifacts":  # An upload that is not confirmed is repeated.
                if arguments[0].artifact_dir in uploaded:
                    return result
                uploaded.add(arguments[0].artifact_dir)
            raise KeyboardInterrupt

        return killed

    for kind, name in WRITING:
        monkeypatch.setattr(kind, name, then_killed(getattr(kind, name)))
    kills = 0
    while _is_killed(fresh, chain):  # after its first call that writes
        kills += 1
    monkeypatch.undo()
    assert kills > 30
    assert shown(fresh) == shown(store)


def _is_killed(store: Store, chain: Path) -> bool:
    try:
        Mirror(store).chain(chain, working=False)
    except KeyboardInterrupt:
        return True
    return False


def test_only_lines_that_no_resume_cuts_are_sent(chain: Path, tmp_path: Path, fresh: Store) -> None:
    folder = tmp_path / "runs" / "mini" / chain.name
    working = folder / "training" / "phase1" / "0123"
    shutil.copytree(chain / "phase1", working)
    shutil.copy(chain / "chain.json", folder)
    done = read_chain(chain).published["phase1"].record
    running = replace(done.attempts[-1], state="running", ended=None)
    history = read_history(working)
    for lines in (3, 5):  # The same mirror sends what became settled since its last call.
        training = replace(done.trained, lines=lines)
        replace(done, status="training", trained=training, attempts=(running,), digest=None).write(working)
        if lines == 3:
            live_mirror = Mirror(fresh)
        live_mirror.chain(folder, working=True)
        status, *_, histories, artifacts, _ = shown(fresh)["mini phase1"]
        sent = sum(len(values) for key, values in histories.items() if not key.startswith("system/"))
        first = [report.values for report in metrics.read_reports(working / metrics.FILE, 0, lines)]
        assert sent == sum(map(len, first)) < sum(map(len, history.values()))
        assert (status, artifacts) == ("RUNNING", [])
    Mirror(fresh).chain(folder, working=False)
    assert shown(fresh)["mini phase1"][0] == "KILLED"


def test_a_store_ignores_a_metric_that_it_has(fresh: Store) -> None:
    client = fresh.client()
    run = client.create_run(experiment_id(client)).info.run_id
    for _ in range(3):
        client.log_batch(run, metrics=[Metric("loss", 0.5, 1000, 7)])
    assert len(client.get_metric_history(run, "loss")) == 1


def test_differences_between_folder_and_store_are_named(copied: tuple[Path, Store]) -> None:
    folder, store = copied
    read = read_chain(folder)
    stage = read.published["phase1"]
    assert differences(store, read, stage) == []
    client = store.client()
    run_id = find_run(client, stage.record.key)
    assert run_id is not None
    client.set_tag(run_id, "hpcm.acceptance", "refused")
    repository = Path(store.artifacts(client, run_id).artifact_dir)
    (repository / "stage.yaml").write_text("name: another\n")
    (repository / "ledger.json").unlink()
    MetricsLog(folder / "phase1" / metrics.FILE).append({"train/extra": 1.0}, 99)
    assert differences(store, read, stage) == [
        "tags missing or different: hpcm.acceptance",
        "metrics missing or different: train/extra",
        "artifacts missing or different: ledger.json",
        "another content of metrics.jsonl",
        "another content of stage.yaml",
    ]
    client.delete_run(run_id)
    assert differences(store, read, stage) == ["MLflow has no run of it; `hpcm sync` adds it"]


def test_an_experiment_in_the_trash_is_named_and_filled_once_restored(chain: Path, store: Store, fresh: Store) -> None:
    client = fresh.client()
    client.delete_experiment(experiment_id(client))
    with pytest.raises(StoreError, match=r"in MLflow's trash: .*mlflow experiments restore --experiment-id 1"):
        Mirror(fresh).chain(chain, working=False)
    client.restore_experiment("1")
    Mirror(fresh).chain(chain, working=False)
    assert shown(fresh) == shown(store)


def test_a_link_among_the_artifacts_is_not_followed(copied: tuple[Path, Store], tmp_path: Path) -> None:
    folder, store = copied
    outside = tmp_path / "outside"
    outside.mkdir()
    place = next((folder.parents[1] / "mlartifacts").glob("*/artifacts/ledger.json")).parent
    (place / "ledger.json").unlink()
    (place / "link").symlink_to(outside)
    with pytest.raises(StoreError, match="links are not followed"):
        Mirror(store).chain(folder, working=False)
    assert list(outside.iterdir()) == []


def test_a_server_that_is_away_neither_stops_nor_delays_a_run(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSE", 0.05)
    monkeypatch.setattr(live, "PATIENCE", 0.5)
    notes: list[str] = []
    with LiveMirror(Store("http://me:s3cret@127.0.0.1:9"), notes.append, chain):
        time.sleep(0.5)
    assert len(notes) == 2
    assert "the run goes on" in notes[0]
    assert "`hpcm sync` sends the rest" in notes[1]
    assert "s3cret" not in "".join(notes)


def test_a_live_mirror_sends_everything_before_it_ends(
    chain: Path, store: Store, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PATIENCE_INTERRUPTED", 60.0)
    notes: list[str] = []
    with pytest.raises(Interrupted), LiveMirror(fresh, notes.append, chain):
        raise Interrupted(15)
    assert notes == []
    assert shown(fresh) == shown(store)
