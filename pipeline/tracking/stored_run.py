"""A run in an MLflow store. It skips entries that the store already has, and checks that new ones arrived."""

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

from pipeline.data.pictures import DataError, read_image
from pipeline.tracking.model_facts import ModelFacts
from pipeline.tracking.registry import Registry
from pipeline.tracking.store import EndState, EntryError, Store, StoreError, experiment_id, find_run
from pipeline.tracking.tags import KEY


class StoredRun:
    """A run in an MLflow store. `time` is in ms since 1970."""

    def __init__(self, store: Store, client: "MlflowClient", run_id: str):
        self.store, self.client, self.run_id = store, client, run_id
        run = client.get_run(run_id)
        self._parameters = set(run.data.params)
        self._inputs = _digests(run)
        histories = {key: client.get_metric_history(run_id, key) for key in run.data.metrics}
        self._last = {key: max(history, key=lambda metric: metric.step) for key, history in histories.items()}
        """The value of each metric at its last step."""
        self._times = {(key, metric.timestamp) for key, history in histories.items() for metric in history}
        """When each metric was logged. A clock that was set back gives later entries earlier times."""
        self._artifacts = store.artifacts(client, run_id)
        self._expected = _Expected()

    def start(self) -> None:
        """Set the run's status to RUNNING."""
        self.client.update_run(self.run_id, status="RUNNING")
        self._expected.status = "RUNNING"

    def parameters(self, values: Mapping[str, str], time: int) -> None:
        """Log the parameters that the run does not have yet."""
        from mlflow.entities import Param

        fresh = [Param(key, value) for key, value in values.items() if key not in self._parameters]
        for first in range(0, len(fresh), 100):
            self.client.log_batch(self.run_id, params=fresh[first : first + 100], synchronous=True)
        self._parameters |= set(values)
        self._expected.parameters |= set(values)

    def tags(self, values: Mapping[str, str], time: int) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in values.items()], synchronous=True)
        self._expected.tags |= values

    def dataset(self, name: str, digest: str, source: str, profile: str, context: str, time: int) -> None:
        """Log a set of images as an input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if digest not in self._inputs:
            dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
            entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
            self.client.log_inputs(self.run_id, datasets=[entry])
        self._inputs.add(digest)
        self._expected.inputs.add(digest)

    def metrics(self, values: Mapping[str, float], step: int, time: int) -> None:
        """Log the metrics whose last step is before `step`."""
        from mlflow.entities import Metric

        self._log([Metric(key, value, time, step) for key, value in values.items() if step > self._step(key)])

    def samples(self, values: Mapping[str, float], repeated: bool, time: int) -> None:
        """Log each metric at the step after its last, if it was not logged at this time.

        A value that equals the last one is logged only if `repeated`.
        """
        from mlflow.entities import Metric

        fresh = []
        for key, value in values.items():
            last = self._last.get(key)
            if last is None or ((key, time) not in self._times and (repeated or value != last.value)):
                fresh.append(Metric(key, value, time, self._step(key) + 1))
        self._log(fresh)

    def _step(self, key: str) -> int:
        return self._last[key].step if key in self._last else -1

    def _log(self, metrics: "list[Metric]") -> None:
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)
            self._expected.metrics |= {metric.key: metric.value for metric in metrics}
        self._last |= {metric.key: metric for metric in metrics}
        self._times |= {(metric.key, metric.timestamp) for metric in metrics}

    def artifact(self, path: Path, folder: str | None, time: int) -> None:
        """Log a file or the contents of a folder. Raises EntryError if neither disk nor store has it."""
        if path.is_dir():
            self._artifacts.log_artifacts(str(path), folder)
            self._expected.artifacts |= {PurePosixPath(folder or "", file.name) for file in path.iterdir()}
        elif path.exists():
            self._artifacts.log_artifact(str(path), folder)
            self._expected.artifacts.add(PurePosixPath(folder or "", path.name))
        elif path.name not in {PurePosixPath(file.path).name for file in self._artifacts.list_artifacts(folder)}:
            raise EntryError(f"{path}: no such file")

    def image(self, path: Path, key: str, step: int, time: int) -> None:
        """Log a picture as `MlflowClient.log_image` does, but under the same name in a second delivery.

        Raises EntryError if neither disk nor store has it, and if the file is not a picture.
        """
        from mlflow.tracking.multimedia import compress_image_size
        from PIL import Image

        start = f"{key.replace('/', '~')}+step+{step}+timestamp+"
        there = [PurePosixPath(file.path).name for file in self._artifacts.list_artifacts("images")]
        name = f"{start}{time}+{uuid.uuid5(uuid.NAMESPACE_URL, f'{self.run_id}/{key}/{step}')}"
        names = (f"{name}.png", f"{name}+compressed.webp")
        earlier = any(other.startswith(start) and other not in names for other in there)
        if not earlier and not set(names) <= set(there):
            if not path.exists():
                raise EntryError(f"{path}: no such file")
            try:
                picture = Image.fromarray(read_image(path))
            except DataError as error:
                raise EntryError(str(error)) from error
            with TemporaryDirectory() as folder:
                for picture_name, form in zip(names, (picture, compress_image_size(picture)), strict=True):
                    form.save(Path(folder, picture_name))
                self._artifacts.log_artifacts(folder, "images")
            self._expected.artifacts |= {PurePosixPath("images", picture_name) for picture_name in names}
        self.tags({"mlflow.loggedImages": "True"}, time)

    def table(self, path: str, columns: list[str], rows: list[list[Any]], time: int) -> None:
        """Log a table as `MlflowClient.log_table` does, but replace an earlier one instead of appending to it."""
        place = PurePosixPath(path)
        if place.is_absolute() or ".." in place.parts or place.suffix != ".json":
            raise EntryError(f"{path!r} is not the path of a table")
        with TemporaryDirectory() as folder:
            file = Path(folder, place.name)
            # JSON has no infinity, but the PSNR of an exact reconstruction is infinite.
            cells = [[None if isinstance(x, float) and not math.isfinite(x) else x for x in row] for row in rows]
            file.write_text(json.dumps({"columns": columns, "data": cells}))
            self._artifacts.log_artifact(str(file), str(place.parent) if len(place.parts) > 1 else None)
        self._expected.artifacts.add(place)
        tables = json.loads(self.client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in tables:
            self.tags({"mlflow.loggedArtifacts": json.dumps([*tables, entry])}, time)

    def model(self, path: Path, facts: ModelFacts, time: int) -> None:
        """Log and register a model."""
        Registry(self.store, self.client).register(self.run_id, facts, path if path.is_dir() else None)

    def end(self, state: EndState, time: int) -> None:
        """Close the run."""
        self.client.set_terminated(self.run_id, state, end_time=time)
        self._expected.status = state

    def confirm(self) -> None:
        """Check that the store shows all entries since the last call. Raises StoreError if it does not."""
        expected, self._expected = self._expected, _Expected()
        missing = expected.missing_in(self.client.get_run(self.run_id))
        for folder in {path.parent for path in expected.artifacts}:
            named = None if folder == PurePosixPath() else str(folder)
            there = {PurePosixPath(file.path) for file in self._artifacts.list_artifacts(named)}
            missing += [
                f"artifact {path}" for path in expected.artifacts if path.parent == folder and path not in there
            ]
        if missing:
            raise StoreError(f"MLflow accepted log entries but does not show them: {', '.join(missing[:3])}")


class _Expected:
    """What the store must show after the entries of a run have arrived."""

    def __init__(self) -> None:
        self.status: str | None = None
        self.parameters: set[str] = set()
        self.tags: dict[str, str] = {}
        self.inputs: set[str] = set()
        self.metrics: dict[str, float] = {}
        self.artifacts: set[PurePosixPath] = set()

    def missing_in(self, run: "Run") -> list[str]:
        """What the run lacks, artifacts not included."""
        missing = [f"parameter {key}" for key in self.parameters - run.data.params.keys()]
        # MLflow truncates long values.
        missing += [
            f"tag {key}" for key, value in self.tags.items() if not value.startswith(run.data.tags.get(key, "?"))
        ]
        missing += [f"dataset {digest}" for digest in self.inputs - _digests(run)]
        missing += [f"metric {key}" for key, value in self.metrics.items() if not _shows(run.data.metrics, key, value)]
        if self.status not in (None, run.info.status):
            missing.append(f"status {self.status}")
        return missing


def _shows(metrics: Mapping[str, float], key: str, value: float) -> bool:
    """Whether a metric has this value. A non-finite value only has to exist: stores change it."""
    return key in metrics and (not math.isfinite(value) or metrics[key] == value)


def _digests(run: "Run") -> set[str]:
    return {entry.dataset.digest for entry in run.inputs.dataset_inputs} if run.inputs else set()


def open_run(
    store: Store, client: "MlflowClient", key: str, name: str, parent: str | None, tags: Mapping[str, str], time: int
) -> StoredRun:
    """The run with this key. If there is none, it is created under the run with the key `parent`."""
    run_id = find_run(client, key)
    if run_id is None:
        wanted = {**tags, KEY: key, "mlflow.runName": name}
        parent_id = find_run(client, parent) if parent else None
        if parent_id is not None:
            wanted["mlflow.parentRunId"] = parent_id
        run_id = client.create_run(experiment_id(client), start_time=time, tags=wanted).info.run_id
    return StoredRun(store, client, run_id)
