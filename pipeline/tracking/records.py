"""Reads the records of chains, stages and comparisons from MLflow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.common.errors import UserError
from pipeline.common.tables import shortest
from pipeline.tracking import tags
from pipeline.tracking.store import Store, StoreError, brief, experiment_id
from pipeline.tracking.tags import ChainTags, StageTags
from pipeline.weights.published import Quality

if TYPE_CHECKING:
    from mlflow.entities import Run

History = list[tuple[int, float]]
"""(step of the stage, value) pairs of a metric."""


@dataclass(frozen=True)
class SegmentRecord:
    """One segment of a stage's schedule and its results."""

    name: str
    objective: str
    steps: int
    handover: int
    rates: dict[str, str]
    """Learning rate by parameter group."""
    seconds: float | None
    """Time of its steps, without interruptions; None if it has not begun."""
    loss: float | None
    """Estimated R-D loss on the validation images at its end."""


@dataclass(frozen=True)
class StageRecord:
    """One stage's run."""

    run_id: str
    state: str
    ended: int
    """End time in ms since 1970; 0 while the run is active."""
    parameters: dict[str, str]
    metrics: dict[str, float]
    """The last value of each metric."""
    tags: StageTags
    segments: tuple[SegmentRecord, ...]
    """Empty for a root that was imported from a file."""

    @property
    def name(self) -> str:
        """The stage's name in its recipe."""
        return str(self.tags.stage)

    @property
    def parent(self) -> str | None:
        """Name of the parent stage; None for a root."""
        parent = self.parameters.get("parent")
        return None if parent == "None" else parent

    @property
    def codec(self) -> dict[str, str]:
        """The codec's configuration: those of MLflow's parameters that begin with `codec.`."""
        return {key: value for key, value in self.parameters.items() if key.startswith("codec.")}

    @property
    def digest(self) -> str | None:
        """Digest of the published weights; None if none are published."""
        return self.tags.checkpoint_digest

    @property
    def quality(self) -> Quality | None:
        """Quality on whole validation images, coded into real bitstreams; None if it was not evaluated."""
        final = {key.removeprefix("final/"): value for key, value in self.metrics.items() if key.startswith("final/")}
        if not {"bpp", "psnr_db", "rd_loss"} <= final.keys():
            return None
        known = {name: final.pop(name) for name in ("bpp", "psnr_db", "rd_loss")}
        return Quality(**known, ms_ssim=final.pop("ms_ssim", None), others=final)

    @property
    def parent_loss(self) -> float | None:
        """Estimated R-D loss of the parent on the same images."""
        return self.metrics.get("val/parent/rd_loss")

    @property
    def step0_loss(self) -> float | None:
        """Estimated R-D loss of the child before its first step."""
        return self.tags.step0_loss

    @property
    def steps(self) -> int:
        """Training steps of the whole schedule."""
        return sum(segment.steps for segment in self.segments)

    @property
    def seconds(self) -> float | None:
        """Time of all training steps, without interruptions; None if none has begun."""
        known = [segment.seconds for segment in self.segments if segment.seconds is not None]
        return sum(known) if known else None

    @property
    def attempts(self) -> list[str]:
        """How each attempt began and, if known, what ended it; oldest first."""
        return [text for _, text in sorted(self.tags.attempts.items())]


@dataclass(frozen=True)
class ChainRecord:
    """One chain with all runs of its stages, oldest first."""

    run_id: str
    state: str
    recipe: str
    lmbda: float
    seed: int
    stages: tuple[StageRecord, ...]

    @property
    def title(self) -> str:
        """Recipe, λ and seed."""
        return f"{self.recipe}, λ = {shortest(self.lmbda)}, seed {self.seed}"

    @cached_property
    def published(self) -> dict[str, StageRecord]:
        """The latest published run of each stage, by name, parents before children."""
        latest: dict[str, StageRecord] = {}
        for stage in sorted(self.stages, key=lambda stage: stage.ended):
            if stage.digest is not None and stage.quality is not None:
                latest[stage.name] = stage
        ordered: dict[str, StageRecord] = {}

        def place(name: str | None) -> None:
            if name in latest and name not in ordered:
                place(latest[name].parent)
                ordered[name] = latest[name]

        for name in sorted(latest):
            place(name)
        return ordered

    def total_steps(self, name: str) -> int:
        """Training steps of a published stage and all its ancestors."""
        stage = self.published[name]
        before = self.total_steps(stage.parent) if stage.parent in self.published else 0
        return before + stage.steps

    def reference(self, name: str) -> str | None:
        """Name of the stage to compare a stage with: the root's codec, trained for the same total number of steps.

        Such a stage is a control. Without a control it is the root, which has fewer steps. None for a stage that has
        the root's codec itself.
        """
        stages = self.published
        codecs = [stage.codec for stage in stages.values() if stage.parent is None]
        if stages[name].codec in codecs:
            return None
        plain = [other for other, stage in stages.items() if stage.codec in codecs]
        equal = [other for other in plain if self.total_steps(other) == self.total_steps(name)]
        roots = [other for other in plain if stages[other].parent is None]
        return next(iter(equal + roots), None)


class RecordsError(UserError):
    """The store does not exist or cannot be read."""


class Records:
    """Reads the MLflow store of a folder of runs. Raises RecordsError if there is none."""

    def __init__(self, runs: Path):
        store = Store.default(runs)
        if store.database is not None and not store.database.is_file():
            raise RecordsError(
                f"{store.database}: no such file: nothing was run in {runs} yet; choose a folder with --runs"
            )
        try:
            self._store, self._client = store, store.client()
            self._experiment = experiment_id(self._client)
        except StoreError as error:
            raise RecordsError(f"{store.shown}: {error}") from error
        except Exception as error:  # MLflow passes on the errors of its backends.
            given = "" if store.database else " (MLFLOW_TRACKING_URI)"
            raise RecordsError(f"{store.shown}{given}: cannot be read as an MLflow store: {brief(error)}") from error

    @cached_property
    def _runs(self) -> list["Run"]:
        """Every run, oldest first."""
        found: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], order_by=["attributes.start_time ASC"], max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def chains(self) -> list[ChainRecord]:
        """All chains with at least one stage that has begun, newest first."""
        stages: dict[str, list[Run]] = {}
        for run in self._runs:
            if tags.STAGE in run.data.tags:
                stages.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run)
        chains = [run for run in self._runs if run.info.run_id in stages]
        return [self._chain(run, stages[run.info.run_id]) for run in reversed(chains)]

    def published_chains(self) -> list[ChainRecord]:
        """Chains with a published stage. The newest of several with the same recipe, λ and seed is used."""
        newest: dict[tuple[str, float, int], ChainRecord] = {}
        for chain in self.chains():
            if chain.published:
                newest.setdefault((chain.recipe, chain.lmbda, chain.seed), chain)
        return list(newest.values())

    def artifacts_of_kind(self, kind: str, path: str) -> list[Path]:
        """The artifact `path` of every run of a kind, such as `comparison`, oldest run first."""
        runs = [run for run in self._runs if run.data.tags.get(tags.KIND) == kind]
        return [self.artifact(run.info.run_id, path) for run in runs]

    def artifact(self, run_id: str, path: str) -> Path:
        """Local path of a run's artifact, downloaded if it is remote."""
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        repository = self._store.artifacts(self._client, run_id)
        if isinstance(repository, LocalArtifactRepository):
            return Path(repository.artifact_dir) / path
        folder = Path(self._elsewhere.name, run_id)
        folder.mkdir(exist_ok=True)
        return Path(repository.download_artifacts(path, str(folder)))

    def artifact_names(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of a run's artifacts in one folder."""
        return [file.path for file in self._store.artifacts(self._client, run_id).list_artifacts(folder)]

    def validation_images(self, stage: StageRecord) -> list[str]:
        """Names of the images that a published stage was evaluated on."""
        evaluation = json.loads(self.artifact(stage.run_id, "evaluation.json").read_text())
        return [image["source"] for image in evaluation["images"]]

    def history(self, run_id: str, key: str) -> History:
        """All values of a metric, by step."""
        return sorted((metric.step, metric.value) for metric in self._client.get_metric_history(run_id, key))

    @cached_property
    def _elsewhere(self) -> "TemporaryDirectory[str]":
        return TemporaryDirectory(prefix="hpcm-", ignore_cleanup_errors=True)

    def _chain(self, run: "Run", stages: Sequence["Run"]) -> ChainRecord:
        chain = ChainTags.from_tags(run.data.tags, run.info.run_id)
        records = tuple(self._stage(stage) for stage in stages)
        return ChainRecord(run.info.run_id, run.info.status, chain.recipe, chain.lmbda, chain.seed, records)

    def _stage(self, run: "Run") -> StageRecord:
        data, found = run.data, StageTags.from_tags(run.data.tags, run.info.run_id)
        segments = () if "baseline" in found.inputs else self._segments(run)
        return StageRecord(
            run.info.run_id, run.info.status, run.info.end_time or 0,
            dict(data.params), dict(data.metrics), found, segments,
        )  # fmt: skip

    def _segments(self, run: "Run") -> tuple[SegmentRecord, ...]:
        """The segments in order of their first logged step: MLflow does not keep the order of the schedule."""
        parameters = run.data.params
        names = {key.split(".")[1] for key in parameters if key.startswith("schedule.")}
        times = {name: self._metric(run, f"train/{name}/step_seconds") for name in names}
        losses = dict(self._metric(run, "val/rd_loss"))
        segments: list[SegmentRecord] = []
        start = 0
        for name in sorted(names, key=lambda name: (times[name][0][0] if times[name] else float("inf"), name)):
            prefix = f"schedule.{name}."
            steps = int(parameters[f"{prefix}steps"])
            segments.append(
                SegmentRecord(
                    name,
                    parameters[f"{prefix}objective"],
                    steps,
                    int(parameters[f"{prefix}handover"]),
                    _rates(parameters, prefix),
                    _seconds(start, times[name]),
                    losses.get(start + steps),
                )
            )
            start += steps
        return tuple(segments)

    def _metric(self, run: "Run", key: str) -> History:
        return self.history(run.info.run_id, key) if key in run.data.metrics else []


def _rates(parameters: dict[str, str], prefix: str) -> dict[str, str]:
    """Learning rate by parameter group. Rates by name pattern share one MLflow parameter, kept under `by name`."""
    keys = [key for key in parameters if key == f"{prefix}lr" or key.startswith(f"{prefix}lr.")]
    return {key.removeprefix(prefix).removeprefix("lr").removeprefix(".") or "by name": parameters[key] for key in keys}


def _seconds(start: int, means: History) -> float | None:
    """Time of a segment that begins after step `start`, in seconds, from the logged mean step times."""
    steps = [start, *(step for step, _ in means)]
    return sum((b - a) * mean for (a, b), (_, mean) in zip(pairwise(steps), means, strict=True)) if means else None
