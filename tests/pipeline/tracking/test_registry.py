"""Published stages in MLflow: models, versions, aliases, pictures and tables, each exactly once."""

import time
from pathlib import Path

import mlflow
import pytest
import torch
from kills import KILLED, delivery, exit_code
from mini import Notes, mini_codec, runs_of
from mlflow.entities import Run
from pandas import DataFrame
from PIL import Image

from pipeline.chain.chain import Chain
from pipeline.tracking.mlflow_model import load_registered, save_mlflow_model
from pipeline.tracking.model_facts import ModelFacts
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.provenance import source_tags
from pipeline.tracking.store import Store, find_run
from pipeline.tracking.system_metrics import sampling
from pipeline.weights.checkpoints import CheckpointError
from pipeline.weights.published import Lineage, publish

NAME = "hpcm-tiny-lmbda-0.013"


def facts(stage: str, loss: float) -> ModelFacts:
    metrics = {"final/bpp": loss / 2, "final/rd_loss": loss}
    return ModelFacts(NAME, stage, f"digest-{stage}-{loss}", metrics, 6, loss, "photos", "data")


def publish_stage(outbox: Outbox, key: str, known: ModelFacts, picture: Path) -> None:
    """Log what a stage logs when it is published. Its model is a folder in a folder."""

    def build(folder: Path) -> None:
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "model.pth").write_text(known.digest)

    run = outbox.run(key, known.stage)
    run.metrics(known.metrics, known.step)
    run.image(picture, "reconstructions/coffee", known.step)
    run.table("images.json", ["image", "bpp"], [["coffee", 0.5], ["sky", None]])
    run.model(known, build)
    run.results({"bpp": known.loss})
    run.end("FINISHED")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


def table(store: Store, run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> DataFrame:
    """A table, read with MLflow's own function."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store.uri)
        return store.client().load_table(run.info.experiment_id, name, [run.info.run_id])


def state(runs: Path, key: str) -> dict[str, object]:
    """All parts of a run that a second delivery could have duplicated."""
    client = Store.default(runs).client()
    run = client.get_run(find_run(client, key))
    models = client.search_logged_models([run.info.experiment_id])
    return {
        "models": [(model.name, str(model.status)) for model in models],
        "model metrics": sorted(
            (metric.key, metric.value, metric.step) for model in models for metric in model.metrics
        ),
        "data": {(metric.dataset_name, metric.dataset_digest) for model in models for metric in model.metrics},
        "outputs": len(run.outputs.model_outputs),
        "versions": [version.tags["hpcm.stage"] for version in client.search_model_versions(f"name = '{NAME}'")],
        "history": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "final/bpp")],
        "results": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "bpp")],
        "pictures": len(client.list_artifacts(run.info.run_id, "images")),
        "aliases": {alias: int(number) for alias, number in client.get_registered_model(NAME).aliases.items()},
    }


def test_what_a_kill_left_half_registered_is_registered_once(
    runs: Path, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outbox"
    outbox = Outbox(folder, Store("nonsense://nowhere"))  # which keeps the entries
    publish_stage(outbox, "k", facts("phase4", 2.0), picture)
    outbox.close(0)
    places = [f"model.{step}:1" for step in ("created", "uploaded", "logged", "versioned")] + ["outbox:2"]
    codes = [exit_code(delivery(folder, runs, {"HPCM_FAULT": place})) for place in places]
    assert codes == [KILLED] * len(places)
    assert Outbox(folder, Store.default(runs)).close(60)
    assert not folder.exists()
    # Published again after a kill before the stage's record was written.
    again = Outbox(folder, Store.default(runs))
    publish_stage(again, "k", facts("phase4", 2.0), picture)
    assert again.close(60)
    assert state(runs, "k") == {
        "models": [("phase4", "READY")],
        "model metrics": [("final/bpp", 1.0, 6), ("final/rd_loss", 2.0, 6)],
        "data": {("photos", "data")},
        "outputs": 1,
        "versions": ["phase4"],
        "history": [(6, 1.0)],
        "results": [(0, 2.0)],
        "pictures": 2,  # in full, and small
        "aliases": {"phase4": 1, "best": 1},
    }
    client = Store.default(runs).client()
    run = client.get_run(find_run(client, "k"))
    assert table(Store.default(runs), run, "images.json", monkeypatch)["image"].tolist() == ["coffee", "sky"]


def test_aliases_name_the_newest_of_a_stage_and_the_best_of_all(runs: Path, tmp_path: Path, picture: Path) -> None:
    outbox = Outbox(tmp_path / "outbox", Store.default(runs))
    for key, known in enumerate([facts("lean", 2.0), facts("v2", 1.0), facts("lean", 3.0)]):
        publish_stage(outbox, f"run{key}", known, picture)
    assert outbox.close(60)
    aliases = Store.default(runs).client().get_registered_model(NAME).aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"lean": 3, "best": 2}  # v2 is MLflow's own


def test_samples_go_on_counting_and_results_are_not_repeated(runs: Path, tmp_path: Path) -> None:
    for _ in range(2):
        outbox = Outbox(tmp_path / "outbox", Store.default(runs))
        run = outbox.run("k", "a run")
        run.samples({"system/cpu": 5.0})
        run.results({"phase1/bpp": 0.5})
        assert outbox.close(60)
    client = Store.default(runs).client()
    steps = {
        key: [metric.step for metric in client.get_metric_history(find_run(client, "k"), key)]
        for key in ("system/cpu", "phase1/bpp")
    }
    assert steps == {"system/cpu": [0, 1], "phase1/bpp": [0]}


def test_a_registered_codec_is_loaded_by_its_alias(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini_codec(4).eval()
    publish(tmp_path / "checkpoint.safetensors", model, Lineage(name="phase4"))
    outbox = Outbox(runs / "outbox", Store.default(runs))
    run = outbox.run("k", "phase4")
    run.model(facts("phase4", 2.0), lambda folder: save_mlflow_model(tmp_path / "checkpoint.safetensors", folder))
    assert outbox.close(60)
    moved = tmp_path / "elsewhere" / "runs"
    moved.parent.mkdir()
    runs.rename(moved)
    Store.default(moved).client()
    monkeypatch.chdir(moved.parent)  # where `runs` is the default
    image = torch.rand(1, 3, 40, 60)
    model.update()
    expected = model.compress(image)
    assert load_registered(f"models:/{NAME}@phase4").compress(image) == expected
    with pytest.raises(CheckpointError, match="MLflow has no such codec"):
        load_registered(f"models:/{NAME}@phase5")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", Store.default(moved).uri)
    assert mlflow.pytorch.load_model(f"models:/{NAME}@phase4").compress(image) == expected


def test_a_chains_page_shows_its_stages(finished: tuple[Chain, Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    client, found = runs_of(finished[0])
    chain = next(run for run in found if "hpcm.stage" not in run.data.tags)
    stages = {run.data.tags["hpcm.stage"]: run for run in found if run is not chain}
    for name, run in stages.items():
        assert chain.data.metrics[f"{name}/bpp"] == run.data.metrics["final/bpp"]
        assert client.get_model_version_by_alias(NAME, name).run_id == run.info.run_id
    shown = table(Store.default(finished[0].runs), chain, "stages.json", monkeypatch)
    assert shown["stage"].tolist() == list(stages)
    note = stages["phase1"].data.tags["mlflow.note.content"]
    assert "Replaces `attn_s3` (cross-attention to rwkv)." in note
    assert f"{stages['phase1'].data.metrics['final/bpp']:.4f} bits per pixel" in note
    assert "Relative to the parent: " in note
    tags = stages["phase4"].data.tags
    assert tags["hpcm.version.torch"] == torch.__version__
    assert tags["hpcm.device"] == "cpu"
    assert {"mlflow.source.name", "mlflow.user"} <= tags.keys()


def test_the_source_of_a_run_is_readable_on_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/bin/hpcm", "run", "phase4", "--data", "photos/train", "--lmbda", "0.05"])
    tags = source_tags(torch.device("cpu"))
    assert tags["mlflow.source.name"] == "hpcm run phase4"
    assert tags["hpcm.command"] == "hpcm run phase4 --data photos/train --lmbda 0.05"


def test_the_machine_is_measured(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")  # on by default
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.chdir(tmp_path)
    outbox = Outbox(tmp_path / "outbox", Store.default(runs))
    run = outbox.run("k", "a run")
    with sampling(run):
        while b"system/" not in outbox.path.read_bytes():
            time.sleep(0.05)
    assert outbox.close(60)
    client = Store.default(runs).client()
    metrics = client.get_run(find_run(client, "k")).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics.keys()
    assert not (tmp_path / "mlflow.db").exists()  # MLflow's own sampler would open a store in the working folder
