"""Checks that the files of every stage are those that MLflow recorded."""

import glob
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.common.files import FileError
from pipeline.tracking.records import ChainRecord, Records, StageRecord
from pipeline.training.estimate import Estimate
from pipeline.weights import checkpoints
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.published import Lineage, PublicationRecord


@dataclass(frozen=True)
class StageAudit:
    """A stage's record and the result of checking its files."""

    record: StageRecord
    files: str
    """`verified`, `superseded` (moved aside and verified there), `not as recorded` or `not published`."""
    problems: tuple[str, ...]
    expected: dict[str, float] = field(default_factory=dict)
    """Seconds of training in each segment, as `hpcm plan --measure` estimated them."""

    @property
    def sound(self) -> bool:
        """Whether the files agree with the record."""
        return not self.problems


@dataclass(frozen=True)
class ChainAudit:
    """One chain, with its stages in the order in which they began."""

    record: ChainRecord
    stages: tuple[StageAudit, ...]


def audit(runs: Path) -> list[ChainAudit]:
    """Read all chains in the store of a folder of runs, newest first, and check their files."""
    records = Records(runs)
    return [
        ChainAudit(chain, tuple(_with_estimate(_check(records, chain, stage, runs), runs) for stage in chain.stages))
        for chain in records.chains()
    ]


def unrecorded(runs: Path, chains: Sequence[ChainAudit]) -> list[str]:
    """One line for each published stage of which MLflow has no run, and for each damaged record of one."""
    known = {stage.record.tags.key for chain in chains for stage in chain.stages}
    lines = []
    for path in sorted([*runs.glob("*/*/*/record.json"), *runs.glob("*/*/superseded/*/record.json")]):
        try:
            key = PublicationRecord.read(path).mlflow_key
        except FileError as error:
            lines.append(str(error))
            continue
        if key is not None and key not in known:
            lines.append(f"{path}: MLflow has no run of this stage; its database or the run was deleted")
    return lines


def _with_estimate(audited: StageAudit, runs: Path) -> StageAudit:
    """Add the times that were estimated before the stage was trained."""
    stage = audited.record
    if stage.tags.checkpoint is None:
        return audited
    try:
        estimate = Estimate.read((runs / stage.tags.checkpoint).parents[1])
    except FileError as error:
        return replace(audited, problems=(*audited.problems, str(error)))
    found = {
        segment.name: cost.seconds
        for segment in stage.segments
        if estimate and (cost := estimate.find(stage.name, segment.name, segment.steps, segment.handover))
    }
    return replace(audited, expected={name: seconds for name, seconds in found.items() if seconds is not None})


def _check(records: Records, chain: ChainRecord, stage: StageRecord, runs: Path) -> StageAudit:
    if stage.digest is None:
        return StageAudit(stage, "not published", ())
    published = runs / (stage.tags.checkpoint or "")
    aside = _set_aside(published, stage)
    path = aside or published
    problems = [*_check_checkpoint(path, stage), *_check_record(path.with_name("record.json"), stage)]
    problems += _check_kept_copy(records, stage)
    problems += _check_parent(chain, stage)
    files = "superseded" if aside else "verified"
    return StageAudit(stage, files if not problems else "not as recorded", tuple(problems))


def _set_aside(published: Path, stage: StageRecord) -> Path | None:
    """Path to which the checkpoint was moved when the stage was rebuilt; None if it was not moved.

    A rebuilt stage may have the same weights, so the record in each folder decides by its MLflow run.
    """
    assert stage.digest is not None
    pattern = f"{glob.escape(published.parent.name)}-{stage.digest[:12]}*"
    for folder in sorted((published.parent.parent / "superseded").glob(pattern)):
        with suppress(FileError):
            if PublicationRecord.read(folder / "record.json").mlflow_key == stage.tags.key:
                return folder / published.name
    return None


def _check_checkpoint(path: Path, stage: StageRecord) -> list[str]:
    try:
        digest, lineage = checkpoints.read(path).metadata["digest"], Lineage.read(path)
    except CheckpointError as error:
        return [str(error)]
    if digest != stage.digest:
        return [f"{path}: not the checkpoint that was recorded ({stage.digest[:12] if stage.digest else '–'}…)"]
    recorded = stage.tags.inputs
    problems = [
        f"{path}: its {name} differs from the recorded one"
        for name, value in lineage.inputs.items()
        if recorded.get(name) != value
    ]
    if stage.quality is not None and lineage.quality != stage.quality:
        problems.append(f"{path}: its quality differs from the recorded one")
    return problems


def _check_record(path: Path, stage: StageRecord) -> list[str]:
    """Check the record beside the checkpoint, from which the chain knows that the stage is done."""
    try:
        record = PublicationRecord.read(path)
    except FileError as error:
        return [str(error)]
    same = record.digest == stage.digest and record.mlflow_key == stage.tags.key
    return [] if same else [f"{path}: names another checkpoint or MLflow run"]


def _check_kept_copy(records: Records, stage: StageRecord) -> list[str]:
    """Check the copy that MLflow keeps as an artifact."""
    try:
        copy = records.artifact(stage.run_id, "checkpoint.safetensors")
        digest = checkpoints.read(copy).metadata["digest"]
    except (CheckpointError, OSError) as error:
        return [f"MLflow's copy: {error}"]
    except Exception as error:  # MLflow passes on any exception of its backends.
        return [f"MLflow's copy cannot be fetched: {type(error).__name__}: {error}"]
    return [] if digest == stage.digest else ["MLflow's copy is not the checkpoint that was recorded"]


def _check_parent(chain: ChainRecord, stage: StageRecord) -> list[str]:
    """Check that the parent's digest is in the chain's record."""
    digest = stage.tags.inputs.get("parent")
    if digest is None or any(other.digest == digest for other in chain.stages if other.name == stage.parent):
        return []
    return [f"its parent {digest[:12]}… is not a {stage.parent} of this chain"]
