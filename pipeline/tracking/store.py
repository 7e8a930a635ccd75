"""MLflow: one parent run per chain and λ, one nested run per stage, each metric of a step logged once.

Runs are found again by a tag, never by an id kept in a file: whatever was killed between creating a run and noting its
id, the same chain and stage lead to the same run.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

from pipeline.data.images import Photos
from pipeline.tracking.tags import KEY

EXPERIMENT = "hpcm"
EndState = Literal["FINISHED", "FAILED", "KILLED"]


class Run:
    """A run that records nothing: what every process but the first one holds."""

    key: str | None = None
    """What the run is found by."""

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters, once; nested mappings become dotted names."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, over what they were."""

    def dataset(self, photos: Photos, context: str) -> None:
        """Log a set of images as an input, `context` being `training` or `validation`."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics at a step of the stage; those already logged there or later are left out."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or a folder with what is in it, as it is now."""

    def end(self, state: EndState) -> None:
        """Close the run."""


class StoredRun:
    """A run in an MLflow store; nothing that it already holds is logged again. `time` is in ms since 1970."""

    def __init__(self, client: "MlflowClient", run_id: str):
        self.client, self.run_id = client, run_id
        run = client.get_run(run_id)
        self._parameters = set(run.data.params)
        self._inputs = {entry.dataset.digest for entry in run.inputs.dataset_inputs} if run.inputs else set()
        self._last_step = {
            key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in run.data.metrics
        }

    def parameters(self, values: Mapping[str, str], time: int) -> None:
        """Log parameters that the run does not have."""
        from mlflow.entities import Param

        fresh = [Param(key, value) for key, value in values.items() if key not in self._parameters]
        for first in range(0, len(fresh), 100):
            self.client.log_batch(self.run_id, params=fresh[first : first + 100], synchronous=True)
        self._parameters |= set(values)

    def tags(self, values: Mapping[str, str], time: int) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in values.items()], synchronous=True)

    def dataset(self, name: str, digest: str, source: str, profile: str, context: str, time: int) -> None:
        """Log a set of images as an input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if digest not in self._inputs:
            dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
            entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
            self.client.log_inputs(self.run_id, datasets=[entry])
        self._inputs.add(digest)

    def metrics(self, values: Mapping[str, float], step: int, time: int) -> None:
        """Log the metrics whose history ends before `step`."""
        from mlflow.entities import Metric

        fresh = [Metric(key, value, time, step) for key, value in values.items() if step > self._last_step.get(key, -1)]
        if fresh:
            self.client.log_batch(self.run_id, metrics=fresh, synchronous=True)
        self._last_step |= {metric.key: step for metric in fresh}

    def artifact(self, path: str, folder: str | None, time: int) -> None:
        """Keep a file, or what is in a folder; one that is gone was kept before."""
        if Path(path).is_dir():
            self.client.log_artifacts(self.run_id, path, folder)
        elif Path(path).exists():
            self.client.log_artifact(self.run_id, path, folder)

    def end(self, state: EndState, time: int) -> None:
        """Close the run."""
        self.client.set_terminated(self.run_id, state, end_time=time)


@dataclass(frozen=True)
class Store:
    """Where runs are kept: a database and a folder beside the runs unless MLFLOW_TRACKING_URI names another."""

    uri: str
    artifacts: str | None = None
    database: Path | None = None

    @classmethod
    def default(cls, runs: Path) -> "Store":
        """The store of a folder of runs."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri:
            return cls(uri)
        runs = runs.absolute()
        database = runs / "mlflow.db"
        return cls(f"sqlite:///{database}", (runs / "mlartifacts").as_uri(), database)

    def client(self) -> "MlflowClient":
        """A client; creates the store and the experiment where they are missing."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Whoever sends tries again by itself, and asks first what the store already has.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.database is not None and not self.database.exists():
            self.database.parent.mkdir(parents=True, exist_ok=True)
            # Beside its place: a database whose tables are half made, because a kill came between, is of no use again.
            partial = self.database.with_name(f"mlflow-{os.getpid()}.partial")
            MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments()
            partial.replace(self.database)
        client = MlflowClient(tracking_uri=self.uri)
        if client.get_experiment_by_name(EXPERIMENT) is None:
            client.create_experiment(EXPERIMENT, artifact_location=self.artifacts)
        return client


def open_run(
    client: "MlflowClient", key: str, name: str, parent: str | None, tags: Mapping[str, str], time: int
) -> StoredRun:
    """The run with this key, under the run with the key `parent`; created if there is none."""
    run_id = find_run(client, key)
    if run_id is None:
        wanted = {**tags, KEY: key, "mlflow.runName": name}
        parent_id = find_run(client, parent) if parent else None
        if parent_id is not None:
            wanted["mlflow.parentRunId"] = parent_id
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        run_id = client.create_run(experiment.experiment_id, start_time=time, tags=wanted).info.run_id
    return StoredRun(client, run_id)


def find_run(client: "MlflowClient", key: str) -> str | None:
    """Id of the run with this key, or None."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1, order_by=["attributes.start_time ASC"]
    )
    return found[0].info.run_id if found else None


def brief(error: Exception) -> str:
    """What MLflow's libraries raised, on one line."""
    return shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")
