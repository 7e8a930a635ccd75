"""Brings MLflow up to the folders of a chain. It asks the store what is there, and adds what is missing.

A mirror may be repeated and interrupted at any call: nothing is deleted after it was sent, and nothing is sent twice.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, FileInfo, InputTag, Metric, Param, Run, RunTag
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from pipeline.common.fault_injection import fault
from pipeline.common.folder_lock import alone_at
from pipeline.records import metrics
from pipeline.records.chains import ChainRecord, StoredStage, read_chain
from pipeline.records.record import DataSet
from pipeline.tracking.registry import register
from pipeline.tracking.store import KEY, Store, brief, experiment_id, find_run
from pipeline.tracking.view import Artifact, RunView, chain_view, stage_view

Item = TypeVar("Item")
DIGEST = 36
"""Characters of a data set's digest; MLflow refuses longer ones."""


@dataclass(frozen=True)
class Missing:
    """What a run in the store lacks, compared with what it should show."""

    parameters: dict[str, str]
    tags: dict[str, str]
    points: tuple[Metric, ...]
    data: tuple[DatasetInput, ...]
    artifacts: tuple[Artifact, ...]
    status: bool

    def lines(self) -> Iterator[str]:
        """One line for each kind of thing that is missing or differs."""
        for what, names in (
            ("parameters", self.parameters),
            ("tags", self.tags),
            ("metrics", dict.fromkeys(point.key for point in self.points)),
            ("data sets", [entry.dataset.name for entry in self.data]),
            ("artifacts", [str(artifact.path) for artifact in self.artifacts]),
        ):
            if names:
                yield f"{what} missing or different: {', '.join(names)}"
        if self.status:
            yield "another status"


class StoredRun:
    """A run in an MLflow store."""

    def __init__(self, store: Store, client: MlflowClient, run_id: str):
        self.store, self.client, self.run_id = store, client, run_id

    @classmethod
    def of(cls, store: Store, client: MlflowClient, view: RunView) -> "StoredRun":
        """The run that shows the view; it is created if the store has none."""
        run_id = find_run(client, view.key)
        if run_id is None:
            tags = {KEY: view.key}
            parent = find_run(client, view.parent) if view.parent else None
            tags |= {"mlflow.parentRunId": parent} if parent else {}
            experiment = experiment_id(client)
            run_id = client.create_run(experiment, view.began, tags, view.name).info.run_id
            fault("mirror.run")
        return cls(store, client, run_id)

    @cached_property
    def shown(self) -> Run:
        """The run as the store has it."""
        return self.client.get_run(self.run_id)

    @cached_property
    def artifacts(self) -> ArtifactRepository:
        """The repository of the run's artifacts."""
        return self.store.artifacts(self.client, self.run_id)

    def missing(self, view: RunView) -> Missing:
        """What the run lacks."""
        data, info = self.shown.data, self.shown.info
        inputs = {entry.dataset.digest for entry in self.shown.inputs.dataset_inputs} if self.shown.inputs else set()
        return Missing(
            {key: value for key, value in view.parameters.items() if key not in data.params},
            # MLflow shortens long values.
            {key: value for key, value in view.tags.items() if not _is_shown(data.tags.get(key), value)},
            tuple(self._missing_points(view)),
            tuple(_data_set(*entry) for entry in view.data if entry[0].digest[:DIGEST] not in inputs),
            tuple(self._missing_artifacts(view)),
            (info.status, info.end_time if view.ended else None) != (view.status, view.ended),
        )

    def _missing_points(self, view: RunView) -> Iterator[Metric]:
        steps: dict[str, set[int]] = {}
        for point in view.points:
            if point.key not in steps:
                known = point.key in self.shown.data.metrics
                history = self.client.get_metric_history(self.run_id, point.key) if known else []
                steps[point.key] = {metric.step for metric in history}
            if point.step not in steps[point.key]:
                steps[point.key].add(point.step)
                yield point

    def _missing_artifacts(self, view: RunView) -> Iterator[Artifact]:
        folders = {artifact.path.parent for artifact in view.artifacts}
        there = {PurePosixPath(file.path) for folder in folders for file in self._listed(folder)}
        for artifact in view.artifacts:
            current = artifact.digest is None or self.shown.data.tags.get(artifact.tag) == artifact.digest
            if artifact.path not in there or not current:
                yield artifact

    def _listed(self, folder: PurePosixPath) -> list[FileInfo]:
        return self.artifacts.list_artifacts(None if folder == PurePosixPath() else str(folder))

    def add(self, view: RunView, missing: Missing) -> None:
        """Add what is missing."""
        for part in _parts(missing.parameters.items(), 100):
            self.client.log_batch(self.run_id, params=[Param(*item) for item in part], synchronous=True)
        for part in _parts(missing.tags.items(), 100):
            self.client.log_batch(self.run_id, tags=[RunTag(*item) for item in part], synchronous=True)
        fault("mirror.tags")
        if missing.data:
            self.client.log_inputs(self.run_id, datasets=list(missing.data))
        for points in _parts(missing.points, 1000):
            self.client.log_batch(self.run_id, metrics=points, synchronous=True)
            fault("mirror.metrics")
        for artifact in missing.artifacts:
            self._add(artifact)
            fault("mirror.artifact")
        if missing.status and view.ended is not None:
            self.client.set_terminated(self.run_id, view.status, view.ended)
        elif missing.status:
            self.client.update_run(self.run_id, view.status)

    def _add(self, artifact: Artifact) -> None:
        with TemporaryDirectory(prefix="hpcm-") as folder:
            file = Path(folder, artifact.path.name)
            artifact.make(file)
            parent = str(artifact.path.parent)
            self.artifacts.log_artifact(str(file), None if parent == "." else parent)
        if artifact.digest is not None:
            self.client.set_tag(self.run_id, artifact.tag, artifact.digest)


@dataclass
class Mirror:
    """Mirrors chains to a store. It remembers what it has mirrored, so that a repetition looks at what is new only."""

    store: Store
    _seen: dict[str, object] = field(default_factory=dict)
    _lines: dict[str, Mapping[str, int]] = field(default_factory=dict)

    @cached_property
    def client(self) -> MlflowClient:
        """A client of the store."""
        return self.store.client()

    def chain(self, folder: Path, running: bool) -> None:
        """Bring the runs of a chain and of its stages up to the chain's folder.

        `running` says whether a process works on the chain. Raises FileError for damaged records, StoreError, and
        whatever MLflow raises.
        """
        chain = read_chain(folder)
        if not chain.stages:
            return
        _ = self.client  # It locks the folder of runs, and locks are not nested.
        with alone_at(folder / "mirror.lock"):  # Two mirrors would each create the runs.
            self._bring(chain_view(chain, running))
            for stage in chain.stages:
                self._stage(chain, stage, running)

    def _stage(self, chain: ChainRecord, stage: StoredStage, running: bool) -> None:
        record = stage.record
        lines = {name: len(list(metrics.read_reports(stage.folder / name))) for name in (metrics.FILE, metrics.SYSTEM)}
        state = (record, running, lines)
        if self._seen.get(record.key) == state:
            return
        run = self._bring(stage_view(chain, stage, running, self._lines.get(record.key, {})))
        if record.status == "done":
            register(self.store, self.client, run.run_id, stage)
        settled = {metrics.FILE: record.trained.lines} if record.status == "training" else {}
        self._lines[record.key] = {**lines, **settled}
        self._seen[record.key] = state

    def _bring(self, view: RunView) -> StoredRun:
        run = StoredRun.of(self.store, self.client, view)
        run.add(view, run.missing(view))
        return run


def differences(store: Store, chain: ChainRecord, stage: StoredStage) -> list[str]:
    """What MLflow lacks of a stage, or shows differently; empty if it agrees with the stage's folder."""
    client = store.client()
    run_id = find_run(client, stage.record.key)
    if run_id is None:
        return ["MLflow has no run of it; `hpcm sync` adds it"]
    run, view = StoredRun(store, client, run_id), stage_view(chain, stage, False, {})
    found = list(run.missing(view).lines())
    for key in dict.fromkeys(point.key for point in view.points):
        values = {metric.step: metric.value for metric in client.get_metric_history(run_id, key)}
        here = [point for point in view.points if point.key == key]
        if any(point.step in values and not _equal(values[point.step], point.value) for point in here):
            found.append(f"another value of {key}")
    return found + _other_contents(run, view)


def check_of(runs: Path) -> Callable[[ChainRecord, StoredStage], list[str]]:
    """A function that gives the `differences` of a stage, or one line if the store cannot be read."""
    store = Store.default(runs)

    def check(chain: ChainRecord, stage: StoredStage) -> list[str]:
        if store.database is not None and not store.database.is_file():
            return [f"{store.database}: no such file; `hpcm sync` makes it"]
        try:
            return [f"MLflow: {line}" for line in differences(store, chain, stage)]
        except Exception as error:  # MLflow passes on the errors of its backends.
            return [f"{store.shown}: cannot be read: {brief(error)}"]

    return check


def _other_contents(run: StoredRun, view: RunView) -> list[str]:
    """The artifacts whose contents in the store differ from what the view makes."""
    lacking = {artifact.path for artifact in run.missing(view).artifacts}
    found = []
    with TemporaryDirectory(prefix="hpcm-") as folder:
        for artifact in view.artifacts:
            if artifact.path not in lacking:
                made = Path(folder, artifact.path.name)
                artifact.make(made)
                if Path(run.artifacts.download_artifacts(str(artifact.path))).read_bytes() != made.read_bytes():
                    found.append(f"another content of {artifact.path}")
    return found


def _data_set(images: DataSet, use: str) -> DatasetInput:
    profile, source = json.dumps({"images": images.images}), json.dumps({"uri": images.source})
    data = Dataset(images.name, images.digest[:DIGEST], source_type="local", source=source, profile=profile)
    return DatasetInput(data, [InputTag("mlflow.data.context", use)])


def _parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of this size; MLflow takes no more at once."""
    every = list(items)
    return (every[first : first + size] for first in range(0, len(every), size))


def _is_shown(shown: str | None, value: str) -> bool:
    """Whether a tag has the value. MLflow shortens long ones."""
    return shown is not None and (shown == value or (len(shown) >= 250 and value.startswith(shown)))


def _equal(a: float, b: float) -> bool:
    return a == b or not (math.isfinite(a) and math.isfinite(b))  # Stores change values that are not finite.
