"""The status of a chain's stages: what is done, stale, interrupted, refused or missing, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.chain.acceptance import judge
from pipeline.chain.changes import recipe_changes
from pipeline.chain.stage_task import StageTask
from pipeline.common.errors import UserError
from pipeline.common.files import FileError
from pipeline.records.record import StageRecord
from pipeline.weights.metadata import CheckpointError, read_digest
from pipeline.weights.training_state import Progress

Status = Literal["done", "interrupted", "refused", "stale", "missing"]


class ChainError(UserError):
    """The stages or their source files cannot be used together."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its status and the reason."""

    task: StageTask
    status: Status
    reason: str
    progress: Progress | None = None
    """The progress of the training that `run` would continue; None if it would begin one, or train nothing."""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.task.stage.name


def plan(tasks: Sequence[StageTask]) -> list[PlannedStage]:
    """The status of every stage, root first. Raises the errors of reading the inputs."""
    planned: list[PlannedStage] = []
    for task in tasks:
        before = planned[-1] if planned else None
        if before is not None and before.status != "done":
            status: Status = "stale" if task.is_published else "missing"
            planned.append(PlannedStage(task, status, f"waits for {before.name}"))
        else:
            planned.append(status_of(task))
    return planned


def status_of(task: StageTask) -> PlannedStage:
    """A stage's status. Its parent must be published."""
    inputs = task.inputs()
    if task.is_published:
        _check_source(task)
    begun = _begun(task)
    if not task.is_published:
        if begun is not None:
            return begun
        other = task.states.other_inputs()
        kept = f"; an interrupted training with other inputs is kept: {_differences(other, inputs)}" if other else ""
        return PlannedStage(task, "missing", f"not built yet{kept}")
    changed = _changes(task, inputs)
    if not changed:  # A training with the same inputs rebuilds the stage on request.
        return begun or PlannedStage(task, "done", "current")
    if begun is None:
        return PlannedStage(task, "stale", f"stale: {changed}")
    if begun.status == "refused":
        return begun
    return PlannedStage(task, "stale", f"stale: {changed}; its rebuilding was {begun.reason}", begun.progress)


def _begun(task: StageTask) -> PlannedStage | None:
    """The status of the unfinished training with the present inputs; None if there is none."""
    progress = task.states.progress()
    record = task.record_of(task.states.folder)
    if record is not None and record.status == "done":
        return PlannedStage(task, "interrupted", "interrupted in its publication", progress)
    if progress is None:
        return None
    trained = progress.segment == len(task.stage.schedule)
    if trained and record is not None and record.status == "refused" and record.result is not None:
        reasons = judge(task.stage.accept, record.result.quality, record.result.parent)
        if reasons:
            return PlannedStage(
                task, "refused", f"refused: {'; '.join(reasons)}; --accept-anyway publishes it", progress
            )
    at = task.position(progress)
    return PlannedStage(task, "interrupted", f"interrupted in {at}", progress)


def _check_source(task: StageTask) -> None:
    """Raise ChainError if a root came from a file and none is given: the option was probably forgotten."""
    if task.imported or task.start:
        return
    record = task.record_of(task.folder)
    for option, make in (("baseline", " (with make: BASELINE=)"), ("start", "")):
        if record and option in record.lineage.inputs:
            raise ChainError(
                f"{task.folder}: this stage was made from a file; give it again with --{option}{make}.\n"
                "  To train the stage from random weights instead, choose another folder with --runs."
            )


def _changes(task: StageTask, inputs: Mapping[str, str]) -> str:
    """Why a published stage is not current, or an empty string."""
    try:
        record = StageRecord.read(task.folder)
        digest = read_digest(task.checkpoint)
    except (FileError, CheckpointError) as error:
        return str(error)
    if digest != record.digest:
        return "the checkpoint differs from the recorded one"
    changed = _differences(record.lineage.inputs, inputs)
    if "recipe changed" in changed and (by_key := recipe_changes(task.checkpoint, task.stage)):
        changed = changed.replace("recipe changed", f"recipe changed ({by_key})")
    return changed


def _differences(known: Mapping[str, str], inputs: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name} changed" if name in known and name in inputs else f"{name} is {'new' if name in inputs else 'gone'}"
        for name in sorted(known.keys() | inputs.keys())
        if known.get(name) != inputs.get(name)
    )
