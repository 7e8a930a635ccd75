"""The status of the stages of a chain: what `run` will do with each, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.chain.changes import changed_inputs
from pipeline.chain.stage_task import StageTask, record_in
from pipeline.common.errors import UserError
from pipeline.common.files import FileError
from pipeline.recipes.schema import Accept
from pipeline.recipes.segment import Segment
from pipeline.records.record import FILE, StageRecord
from pipeline.weights.metadata import CheckpointError, read_digest
from pipeline.weights.published import Quality

Status = Literal["done", "interrupted", "refused", "superseded", "stale", "missing"]
FORCED = "--force rebuilds it"


class ChainError(UserError):
    """The stages or their source files cannot be used together."""


@dataclass(frozen=True)
class Position:
    """A place in a schedule: the segment (its index), steps done in it and in the stage."""

    segment: int
    step: int
    stage_step: int

    @classmethod
    def after(cls, steps: int, schedule: Sequence[Segment]) -> "Position":
        """The place after this number of steps of the stage. After the last segment comes the evaluation."""
        left = steps
        for number, segment in enumerate(schedule):
            if left < segment.steps:
                return cls(number, left, steps)
            left -= segment.steps
        return cls(len(schedule), 0, steps)

    def named(self, schedule: Sequence[Segment]) -> str:
        """The place in words, such as `frozen at step 300`."""
        names = [*(segment.name for segment in schedule), "evaluation"]
        return f"{names[self.segment]} at step {self.step}"


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its status and the reason."""

    task: StageTask
    status: Status
    reason: str
    progress: Position | None = None
    """Where the training continues; None if `run` would begin one, or train nothing."""
    complete: Path | None = None
    """The folder of a complete stage that only has to be moved into its place."""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.task.stage.name

    @property
    def trains(self) -> bool:
        """Whether something is left to train or to evaluate."""
        return self.status != "done" and self.complete is None and self.task.imported is None


def status_of(task: StageTask, before: PlannedStage | None = None, force: bool = False) -> PlannedStage:
    """A stage's status. `before` is its parent's plan; None for a root, or if the parent is published.

    With `force` a current stage is stale. Raises ChainError and the errors of reading the inputs.
    """
    if before is not None and before.status != "done":
        return PlannedStage(task, "stale" if task.is_published else "missing", f"waits for {before.name}")
    inputs = task.inputs()
    if task.is_published:
        _check_source(task)
    working = task.working(inputs)
    if (working / FILE).exists():
        return _begun(task, working)
    changed = _changes(task, inputs) if task.is_published else ""
    if task.is_published and not changed:
        return PlannedStage(task, "stale", FORCED) if force else PlannedStage(task, "done", _current(task))
    if superseded := task.superseded(inputs):
        reason = f"{changed or 'not built yet'}; superseded/{superseded.name} has the same inputs and moves back"
        return PlannedStage(task, "superseded", reason, complete=superseded)
    if changed:
        return PlannedStage(task, "stale", f"stale: {changed}")
    kept = next(filter(None, (record_in(path.parent) for path in sorted(task.trainings.glob(f"*/{FILE}")))), None)
    other = "; an interrupted training with other inputs is kept: "
    differing = other + changed_inputs(kept.lineage, inputs, task.stage) if kept else ""
    return PlannedStage(task, "missing", f"not built yet{differing}")


def _current(task: StageTask) -> str:
    """`current`, with a remark if the stage's results are of other validation images than the recipe's."""
    measured = StageRecord.read(task.folder).val_images
    if measured.digest == task.val_photos.digest:
        return "current"
    return f"current; its results are of other images ({measured.name}): `hpcm evaluate` measures it on these"


def _begun(task: StageTask, working: Path) -> PlannedStage:
    """The status of a stage whose training has begun. Raises ChainError for a damaged record."""
    try:
        record = StageRecord.read(working)
    except FileError as error:
        raise ChainError(f"{error}.\n  Restore the file, or delete the training with `hpcm clean`.") from error
    if record.status == "done":
        return PlannedStage(task, "interrupted", "interrupted in publication", complete=working)
    schedule = task.stage.schedule if task.imported is None else ()
    at = Position.after(record.trained.steps, schedule)
    refused = record.result if record.status == "refused" else None
    if refused and (reasons := judge(task.stage.accept, refused.quality, refused.parent)):
        return PlannedStage(task, "refused", f"refused: {'; '.join(reasons)}; --accept-anyway publishes it", at)
    return PlannedStage(task, "interrupted", f"interrupted in {at.named(schedule)}", at)


def _check_source(task: StageTask) -> None:
    """Raise ChainError if a root came from a file and none is given: the option was probably forgotten."""
    record = None if task.imported or task.start else record_in(task.folder)
    for option, make in (("baseline", " (with make: BASELINE=)"), ("start", "")):
        if record and option in record.lineage.inputs:
            raise ChainError(
                f"{task.folder}: this stage was made from a file; give it again with --{option}{make}.\n"
                "  To train the stage from random weights instead, choose another folder with --runs."
            )


def _changes(task: StageTask, inputs: dict[str, str]) -> str:
    """Why a published stage is not current, or an empty string."""
    try:
        record = StageRecord.read(task.folder)
        digest = read_digest(task.checkpoint)
    except (FileError, CheckpointError) as error:
        return str(error)
    if digest != record.digest:
        return "the checkpoint differs from the recorded one"
    return changed_inputs(record.lineage, inputs, task.stage)


def judge(limits: Accept, quality: Quality, parent: Quality | None) -> list[str]:
    """The limits that a result exceeds, one phrase each. A result without parent exceeds none."""
    if parent is None:
        return []
    measured = {
        "bpp_change": quality.bpp / parent.bpp - 1,
        "psnr_drop": parent.psnr_db - quality.psnr_db,
        "rd_loss_change": quality.rd_loss / parent.rd_loss - 1,
    }
    return [
        f"{name} is {value:+.4f}, allowed {allowed:+.4f}"
        for name, value in measured.items()
        if (allowed := getattr(limits, name)) is not None and not value <= allowed  # NaN exceeds every limit.
    ]
