"""Brings MLflow up to the folders of a chain. It asks the store what is there, and adds what is missing.

A mirror may be repeated, and interrupted at any call: nothing is deleted after it was sent, and nothing is sent twice.
MLflow ignores a metric that it has with the same step, time and value.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.common.errors import UserError
from pipeline.common.files import FileError
from pipeline.common.folder_lock import alone_at, is_held
from pipeline.records import metrics
from pipeline.records.chains import ChainRecord, StoredStage, read_chain
from pipeline.records.record import DataSet
from pipeline.tracking.registry import DIGITS, register
from pipeline.tracking.store import KEY, Store, StoreError, brief, experiment_id, find_run
from pipeline.tracking.view import Artifact, RunView, chain_view, stage_view
from pipeline.weights.metadata import CheckpointError


@dataclass
class Missing:
    """What a run in the store lacks, compared with its view."""

    parameters: list[Param] = field(default_factory=list)
    tags: list[RunTag] = field(default_factory=list)
    data: list[DatasetInput] = field(default_factory=list)
    points: list[Metric] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    status: bool = False
    other: list[str] = field(default_factory=list)
    """What the store has with another value, which cannot be changed."""

    def lines(self) -> list[str]:
        """What is missing or different, in one line each."""
        names = {
            "parameters": [parameter.key for parameter in self.parameters],
            "tags": [tag.key for tag in self.tags],
            "data sets": [entry.dataset.name for entry in self.data],
            "metrics": list(dict.fromkeys(point.key for point in self.points)),
            "artifacts": [artifact.path for artifact in self.artifacts],
        }
        lines = [f"{kind} missing or different: {', '.join(found)}" for kind, found in names.items() if found]
        return lines + ["another status or end"] * self.status + self.other


class StoredRun:
    """A run in an MLflow store, beside its view."""

    def __init__(self, store: Store, client: MlflowClient, run_id: str, view: RunView):
        self.client, self.run_id, self.view = client, run_id, view
        self.shown = client.get_run(run_id)
        self.artifacts = store.artifacts(client, run_id)

    def missing(self, contents: bool = False) -> Missing:
        """What the run lacks. With `contents`, all artifacts are read, and not only texts."""
        found, view, data, info = Missing(), self.view, self.shown.data, self.shown.info
        for key, value in view.parameters.items():
            if key not in data.params:
                found.parameters.append(Param(key, value))
            elif data.params[key] != value:
                found.other.append(f"another value of the parameter {key}")
        found.tags = [RunTag(key, value) for key, value in view.tags.items() if data.tags.get(key) != value]
        inputs = self.shown.inputs.dataset_inputs if self.shown.inputs else ()
        known = {entry.dataset.digest for entry in inputs}
        found.data = [_data_set(*entry) for entry in view.data if entry[0].digest[:DIGITS] not in known]
        found.status = (info.status, info.end_time if view.ended else None) != (view.status, view.ended)
        self._compare_metrics(found)
        found.artifacts = list(self._missing_artifacts(contents))
        return found

    def _compare_metrics(self, found: Missing) -> None:
        shown, histories = self.shown.data.metrics, dict[str, dict[tuple[int, int], float]]()
        for point in self.view.points:
            if point.key not in histories:
                history = self.client.get_metric_history(self.run_id, point.key) if point.key in shown else []
                histories[point.key] = {(metric.step, metric.timestamp): metric.value for metric in history}
            value = histories[point.key].get((point.step, point.timestamp))
            if value is None:
                found.points.append(point)
            elif not _equal(value, point.value):
                found.other.append(f"another value of {point.key} at step {point.step}")
        for point in self.view.latest:
            if point.key not in shown or not _equal(shown[point.key], point.value):
                # The step counts the values that were replaced.
                steps = [metric.step for metric in self.client.get_metric_history(self.run_id, point.key)]
                found.points.append(Metric(point.key, point.value, point.timestamp, max(steps, default=-1) + 1))

    def _missing_artifacts(self, contents: bool) -> Iterator[Artifact]:
        folders = {_folder(artifact.path) for artifact in self.view.artifacts}
        there = {file.path for folder in folders for file in self.artifacts.list_artifacts(folder)}
        for artifact in self.view.artifacts:
            read = artifact.text is not None or (contents and not artifact.derived)
            if artifact.path not in there or (read and not self._has(artifact)):
                yield artifact

    def _has(self, artifact: Artifact) -> bool:
        with TemporaryDirectory(prefix="hpcm-") as folder:
            written = Path(folder, "written")
            artifact.write(written)
            stored = self.artifacts.download_artifacts(artifact.path, folder)
            return Path(stored).read_bytes() == written.read_bytes()

    def add(self, missing: Missing) -> None:
        """Add what is missing. Raises FileError if the stage's folder lacks files, after the others were sent."""
        if missing.points or missing.parameters or missing.tags:  # MLflow divides them into requests.
            self.client.log_batch(self.run_id, missing.points, missing.parameters, missing.tags, synchronous=True)
        if missing.data:
            self.client.log_inputs(self.run_id, datasets=missing.data)
        if missing.status and self.view.ended is not None:
            self.client.set_terminated(self.run_id, self.view.status, self.view.ended)
        elif missing.status:
            self.client.update_run(self.run_id, self.view.status)
        problems = []
        for artifact in missing.artifacts:
            with TemporaryDirectory(prefix="hpcm-") as folder:
                file = Path(folder, PurePosixPath(artifact.path).name)
                try:
                    artifact.write(file)
                except FileError as error:  # The other files are sent.
                    problems.append(str(error))
                else:
                    self.artifacts.log_artifact(str(file), _folder(artifact.path))
        if problems:
            raise FileError("; ".join(problems))


class Mirror:
    """Mirrors chains to a store. It remembers what it has mirrored, so that a repetition looks at what is new only."""

    def __init__(self, store: Store):
        self.store = store
        self._mirrored: dict[str, tuple[object, ...]] = {}
        self._lines: dict[str, Mapping[str, int]] = {}

    @cached_property
    def client(self) -> MlflowClient:
        """A client of the store."""
        return self.store.client()

    def chain(self, folder: Path, working: bool) -> None:
        """Bring the runs of a chain and of its stages up to the chain's folder.

        `working` says whether a process works on the chain. Raises StoreError if the store does not answer, and for
        what cannot be mirrored, after everything else was.
        """
        problems: list[str] = []
        # The lock is for two mirrors at once, which would each create the runs.
        with alone_at(folder / "mirror.lock"), self.store.errors_as_its_own():
            chain = read_chain(folder, problems)
            if chain.stages and self._mirrored.get(chain.key) != (chain, working):
                self._bring(chain_view(chain, working))
                self._mirrored[chain.key] = chain, working
            for stage in chain.stages:
                try:
                    self._stage(chain, stage, working)
                except (UserError, OSError) as error:
                    if not stage.folder.exists():  # It was published or moved just now: the next mirror sends it.
                        continue
                    if not isinstance(error, FileError | CheckpointError):
                        raise
                    problems.append(f"{stage.folder}: {error}")
                except MlflowException as error:
                    if error.get_http_status_code() != 400:
                        raise
                    problems.append(f"{stage.folder}: refused by MLflow: {brief(error)}")
        if problems:
            raise StoreError("\n".join(problems))

    def _stage(self, chain: ChainRecord, stage: StoredStage, working: bool) -> None:
        record = stage.record
        lines = {name: metrics.count_lines(stage.folder / name) for name in (metrics.FILE, metrics.SYSTEM)}
        state = (stage, working, lines)
        if self._mirrored.get(record.key) == state:
            return
        view = stage_view(chain, stage, working, self._lines.get(record.key, {}))
        run_id = self._bring(view)
        if record.status == "done":
            final = [point for point in view.points if point.key.startswith("final/")]
            register(self.store, self.client, run_id, stage, final)
        settled = lines[metrics.FILE] if stage.settled is None else stage.settled
        self._lines[record.key] = {**lines, metrics.FILE: settled}
        self._mirrored[record.key] = state

    def _bring(self, view: RunView) -> str:
        run_id = find_run(self.client, view.key)
        if run_id is None:
            parent = find_run(self.client, view.parent) if view.parent else None
            tags = {KEY: view.key, **({"mlflow.parentRunId": parent} if parent else {})}
            run_id = self.client.create_run(experiment_id(self.client), view.began, tags, view.name).info.run_id
        run = StoredRun(self.store, self.client, run_id, view)
        run.add(run.missing())
        return run_id


def differences(store: Store, chain: ChainRecord, stage: StoredStage) -> list[str]:
    """What MLflow lacks of a stage, or shows differently; empty if it agrees with the stage's folder."""
    if store.database is not None and not store.database.is_file():
        return [f"{store.database}: no such file; `hpcm sync` makes it"]
    with store.errors_as_its_own():
        client = store.client()
        run_id = find_run(client, stage.record.key)
        if run_id is None:
            return ["MLflow has no run of it; `hpcm sync` adds it"]
        view = stage_view(chain, stage, is_held(chain.folder), {})
        return StoredRun(store, client, run_id, view).missing(contents=True).lines()


def check_of(runs: Path) -> Callable[[ChainRecord, StoredStage], list[str]]:
    """A function that gives the `differences` of a stage, or one line if the store cannot be read."""
    store = Store.default(runs)

    def check(chain: ChainRecord, stage: StoredStage) -> list[str]:
        try:
            return [f"MLflow: {line}" for line in differences(store, chain, stage)]
        except UserError as error:
            return [str(error)]

    return check


def _data_set(images: DataSet, use: str) -> DatasetInput:
    profile, source = json.dumps({"images": images.images}), json.dumps({"uri": images.source})
    data = Dataset(images.name, images.digest[:DIGITS], source_type="local", source=source, profile=profile)
    return DatasetInput(data, [InputTag("mlflow.data.context", use)])


def _folder(path: str) -> str | None:
    return path.rpartition("/")[0] or None


def _equal(a: float, b: float) -> bool:
    """Whether two values are equal as far as a store keeps them. It has no infinity, and may have no NaN."""
    limit = sys.float_info.max
    return a == b or b != b or (abs(a) >= limit and abs(b) >= limit)
