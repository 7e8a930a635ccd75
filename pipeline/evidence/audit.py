"""Checks that the files of every stage are those that its record names. It reads folders only."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.common.files import FileError, file_digest
from pipeline.records.chains import CHAIN_FILE, ChainRecord, StoredStage, read_chain
from pipeline.records.record import CHECKPOINT, FILE
from pipeline.training.estimate import Estimate
from pipeline.weights import checkpoints
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.published import Lineage

Check = Callable[[ChainRecord, StoredStage], Sequence[str]]
"""Finds further problems of a stage, such as differences from MLflow."""


@dataclass(frozen=True)
class StageAudit:
    """A stage and the result of checking its files."""

    stage: StoredStage
    problems: tuple[str, ...]
    expected: dict[str, float] = field(default_factory=dict)
    """Seconds of training in each segment, as `hpcm plan --measure` estimated them."""

    @property
    def files(self) -> str:
        """`verified`, `superseded` (moved aside and verified there), `not as recorded`, or why nothing is published."""
        if self.problems:
            return "not as recorded"
        status = "interrupted" if self.stage.record.status == "training" else self.stage.record.status
        return {"published": "verified", "training": status}.get(self.stage.place, self.stage.place)


@dataclass(frozen=True)
class ChainAudit:
    """One chain, with its stages in the order in which they began."""

    record: ChainRecord
    stages: tuple[StageAudit, ...]


def audit(runs: Path, check: Check = lambda chain, stage: ()) -> tuple[list[ChainAudit], list[str]]:
    """Check all chains in a folder of runs. Returns them, newest first, and the problems that belong to no stage."""
    chains, problems = list[ChainAudit](), list[str]()
    # A chain whose `chain.json` was lost is found by the usual name of its folder.
    for folder in sorted({*(path.parent for path in runs.glob(f"*/*/{CHAIN_FILE}")), *runs.glob("*/lmbda-*/")}):
        for path in sorted([*folder.glob(f"*/{CHECKPOINT}"), *folder.glob(f"superseded/*/{CHECKPOINT}")]):
            if not path.with_name(FILE).exists():
                problems.append(f"{path.with_name(FILE)}: no such file; the stage has no record")
        try:
            chain, estimate = read_chain(folder, problems), Estimate.read(folder)
        except FileError as error:
            problems.append(str(error))
            continue
        if chain.stages:
            chains.append(
                ChainAudit(chain, tuple(_audit_stage(chain, stage, estimate, check) for stage in chain.stages))
            )
    return sorted(chains, key=lambda chain: chain.record.stages[0].record.began, reverse=True), problems


def _audit_stage(chain: ChainRecord, stage: StoredStage, estimate: Estimate | None, check: Check) -> StageAudit:
    record, expected = stage.record, dict[str, float]()
    for segment in record.schedule if estimate else ():
        found = estimate and estimate.find(record.name, segment["name"], segment["steps"], segment["handover"])
        if found and (seconds := found.seconds(loading=False)) is not None:
            expected[segment["name"]] = seconds
    return StageAudit(stage, (*_problems(chain, stage), *check(chain, stage)), expected)


def _problems(chain: ChainRecord, stage: StoredStage) -> Iterator[str]:
    """What is wrong with a complete stage."""
    record = stage.record
    if record.status != "done":
        if stage.place in ("published", "superseded"):
            yield f"{stage.folder / FILE}: says that the stage is not complete, but '{record.status}'"
        return
    for name, digest in {CHECKPOINT: None, **record.files}.items():
        path = stage.folder / name
        try:
            if file_digest(path) != digest:
                yield f"{path}: changed after it was published"
        except FileError as error:
            yield str(error)
    yield from _checkpoint_problems(stage)
    parent = record.lineage.inputs.get("parent")
    known = {other.record.digest for other in chain.stages if other.record.name == record.parent}
    if parent is not None and parent not in known:
        yield f"{stage.folder}: its parent {parent[:12]}… is not a {record.parent} of this chain"


def _checkpoint_problems(stage: StoredStage) -> Iterator[str]:
    """Check the tensors by their digest, and what the checkpoint says about its origin."""
    path, record = stage.folder / CHECKPOINT, stage.record
    if not path.exists():
        return
    try:
        metadata, lineage = checkpoints.read(path).metadata, Lineage.read(path)
    except CheckpointError as error:
        yield str(error)
        return
    if metadata["digest"] != record.digest:
        yield f"{path}: not the checkpoint that was recorded ({(record.digest or '–')[:12]}…)"
    if replace(lineage, identity=None) != record.lineage or metadata["config"] != record.codec:
        yield f"{path}: its lineage or configuration differs from the recorded one"
