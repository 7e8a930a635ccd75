"""What MLflow's pages show, for comparing stores, and a training that they show."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from pipeline.records.record import StageRecord
from pipeline.tracking.store import Store, experiment_id


def shown(store: Store) -> dict[str, Any]:
    """Everything that MLflow's pages show, by the name of run or model, without the ids that MLflow chooses."""
    client = store.client()
    runs = list(client.search_runs([experiment_id(client)]))
    names = {run.info.run_id: str(run.info.run_name) for run in runs}
    assert len(set(names.values())) == len(runs), "two runs of one stage"
    found: dict[str, Any] = {names[run.info.run_id]: _run(store, client, run, names) for run in runs}
    models = client.search_logged_models([experiment_id(client)])
    found["logged models"] = sorted(
        (
            model.name, str(model.status), names[str(model.source_run_id)], _own(model.tags),
            sorted((m.key, m.value, m.step, m.timestamp, m.dataset_digest) for m in model.metrics or ()),
            sorted(_files(store.model_artifacts(model))),
        )
        for model in models
    )  # fmt: skip
    for registered in client.search_registered_models():
        versions = client.search_model_versions(f"name = '{registered.name}'")
        rows = [(int(version.version), names[version.run_id], version.tags) for version in versions]
        aliases = {alias: int(number) for alias, number in registered.aliases.items()}
        found[registered.name] = {"versions": sorted(rows, key=lambda row: row[0]), "aliases": aliases}
    return found


def _run(store: Store, client: MlflowClient, run: Run, names: dict[str, str]) -> dict[str, Any]:
    tags = dict(run.data.tags)
    tags["mlflow.parentRunId"] = names.get(tags.get("mlflow.parentRunId", ""), "")
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    outputs = run.outputs.model_outputs if run.outputs else []
    return {
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "parameters": run.data.params,
        "tags": tags,
        "metrics": {key: sorted((m.step, m.timestamp, repr(m.value)) for m in h) for key, h in histories.items()},
        "artifacts": sorted(_files(store.artifacts(client, run.info.run_id))),
        "data": sorted((entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs),
        "models": len(outputs),
    }


def _own(tags: dict[str, str]) -> dict[str, str]:
    """The tags that the mirror sets; a server sets another one itself."""
    return {name: value for name, value in tags.items() if name.startswith("hpcm.")}


def _files(repository: ArtifactRepository, folder: str | None = None) -> list[str]:
    listed = repository.list_artifacts(folder)
    inside = [path for file in listed if file.is_dir for path in _files(repository, file.path)]
    return [file.path for file in listed if not file.is_dir] + inside


def training(chain: Path, folder: Path, lines: int, key: str = "") -> Path:
    """Write a chain with an unfinished Phase 1, of which the first lines are settled. Returns the working folder.

    With `key`, the stage has this key, and the name `phase1 <key>`.
    """
    working = folder / "training" / "phase1" / "0123"
    if not working.exists():
        shutil.copytree(chain / "phase1", working)
        shutil.copy(chain / "chain.json", folder)
    done = StageRecord.read(chain / "phase1")
    changed = {"status": "training", "digest": None, "result": None, "files": {}}
    attempts = (replace(done.attempts[-1], state="running", ended=None),)
    named = {"key": key, "name": f"phase1 {key}"} if key else {}
    trained = replace(done.trained, lines=lines)
    replace(done, trained=trained, attempts=attempts, **changed, **named).write(working)
    return working


def measured(record: StageRecord, **quality: float) -> StageRecord:
    """The record of a published stage with other results of its images."""
    evaluation = record.result.evaluation
    images = tuple(replace(image, quality=replace(image.quality, **quality)) for image in evaluation.images)
    return replace(record, result=replace(record.result, evaluation=replace(evaluation, images=images)))


def twice_at_once(work: Callable[[], None]) -> None:
    """Run a function in two threads."""
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
