"""MLflow: one parent run per chain and λ, one nested run per stage, each metric of a step logged once.

Runs are found again by a tag, never by a file: whatever was killed between creating a run and noting its id, the same
chain and stage lead to the same run.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

from pipeline.photos import Photos

EXPERIMENT = "hpcm"
KEY_TAG = "hpcm.key"
_NAME = re.compile(r"[\w.: /-]+")
EndState = Literal["FINISHED", "FAILED", "KILLED"]


class Run:
    """A run that records nothing: what every process but the first one holds."""

    run_id: str | None = None

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters, once; nested mappings become dotted names."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, over what they were."""

    def dataset(self, photos: Photos, context: str) -> None:
        """Log a set of images as an input, `context` being `training` or `validation`."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics at a step of the stage; those already logged there or later are left out."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or a folder with what is in it."""

    def end(self, state: EndState) -> None:
        """Close the run."""


class MlflowRun(Run):
    """A run in an MLflow store, reopened if it exists."""

    def __init__(self, client: "MlflowClient", run_id: str):
        self.client, self.run_id = client, run_id
        run = client.get_run(run_id)
        self._parameters = set(run.data.params)
        self._inputs = {entry.dataset.digest for entry in run.inputs.dataset_inputs} if run.inputs else set()
        self._last_step = {
            key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in run.data.metrics
        }
        client.update_run(run_id, status="RUNNING")

    def parameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:6000]) for key, value in _flatten(values) if key not in self._parameters]
        for first in range(0, len(flat), 100):
            self.client.log_batch(self._id, params=flat[first : first + 100])
        self._parameters |= {parameter.key for parameter in flat}

    def tags(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            self.client.set_tag(self._id, key, value)

    def dataset(self, photos: Photos, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = photos.digest[:36]
        if digest in self._inputs:
            return
        self._inputs.add(digest)
        profile = f'{{"images": {len(photos.paths)}, "skipped": {len(photos.skipped)}}}'
        source = f'{{"uri": "{photos.source}"}}'
        dataset = Dataset(photos.name, digest, source_type="local", source=source, profile=profile)
        tag = InputTag("mlflow.data.context", context)
        self.client.log_inputs(self._id, datasets=[DatasetInput(dataset, [tag])])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        fresh = [Metric(key, value, now, step) for key, value in values.items() if step > self._last_step.get(key, -1)]
        if fresh:
            self.client.log_batch(self._id, metrics=fresh)
        self._last_step |= {metric.key: step for metric in fresh}

    def artifact(self, path: Path, folder: str | None = None) -> None:
        if path.is_dir():
            self.client.log_artifacts(self._id, str(path), folder)
        else:
            self.client.log_artifact(self._id, str(path), folder)

    def end(self, state: EndState) -> None:
        self.client.set_terminated(self._id, state)

    @property
    def _id(self) -> str:
        assert self.run_id is not None
        return self.run_id


@dataclass(frozen=True)
class Store:
    """An MLflow tracking store: an embedded SQLite one beside the runs unless MLFLOW_TRACKING_URI names another."""

    uri: str
    artifacts: str | None

    @classmethod
    def default(cls, runs: Path) -> "Store":
        """The store of a folder of runs."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri:
            return cls(uri, None)
        runs = runs.absolute()
        runs.mkdir(parents=True, exist_ok=True)
        return cls(f"sqlite:///{runs / 'mlflow.db'}", (runs / "mlartifacts").as_uri())

    def client(self) -> "MlflowClient":
        """A client; creates the store and the experiment where they are missing."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        if client.get_experiment_by_name(EXPERIMENT) is None:
            client.create_experiment(EXPERIMENT, artifact_location=self.artifacts)
        return client

    def open_run(
        self, key: str, name: str, parent: Run | None = None, tags: Mapping[str, str] | None = None
    ) -> MlflowRun:
        """The run with this key, created if there is none; its state is RUNNING."""
        client = self.client()
        run_id = find_run(client, key)
        if run_id is None:
            wanted = {KEY_TAG: key, "mlflow.runName": name, **(tags or {})}
            if parent is not None and parent.run_id is not None:
                wanted["mlflow.parentRunId"] = parent.run_id
            experiment = client.get_experiment_by_name(EXPERIMENT)
            assert experiment is not None
            run_id = client.create_run(experiment.experiment_id, tags=wanted).info.run_id
        return MlflowRun(client, run_id)


def find_run(client: "MlflowClient", key: str) -> str | None:
    """Id of the run with this key, or None."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return found[0].info.run_id if found else None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and all(map(_NAME.fullmatch, value)):
            flat += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                flat += _flatten(item, f"{prefix}{key}.{item.get('name', index)}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
