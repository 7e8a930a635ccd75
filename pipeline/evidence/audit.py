"""Checks in folders alone that the files of every stage are those of its record, and shows how it was built."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.common.files import FileError, file_digest
from pipeline.common.tables import Table
from pipeline.evaluation.results import cells
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
        if found and found.cost:
            expected[segment["name"]] = found.seconds(loading=False)
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


def tables(chain: ChainAudit) -> Iterable[Table]:
    """Two tables per chain: the result of each stage, and how it was built."""
    columns = ("stage", "parent", "loss in", "step 0", "out", "coded bpp", "PSNR dB", "files")
    results = Table(chain.record.title, columns, left=2)
    story = Table("how it was built", ("stage", "transferred", "trained", "outcome"), left=4)
    for audited in chain.stages:
        record = audited.stage.record
        known = (record.start.parent, record.start.step0, record.quality)
        losses = (f"{quality.rd_loss:.4f}" if quality else "–" for quality in known)
        rate = cells(record.quality)[:2] if record.quality else ("–", "–")
        results.add(record.name, record.parent or "–", *losses, *rate, audited.files)
        tensors = (f"{count} {kind}" for kind, count in sorted(record.start.tensors.items()))
        trained = "\n".join(_segments(audited)) or "taken from a file"
        story.add(record.name, "\n".join(tensors) or "–", trained, "\n".join(_outcome(audited)) or "–")
    yield results
    yield story


def _segments(audited: StageAudit) -> Iterator[str]:
    """`frozen: 60 steps in 0.3 min (-5 % of the estimate), handover 40; new 0.001`."""
    results = {result.name: result for result in audited.stage.record.segments}
    for segment in audited.stage.record.schedule:
        name, took = segment["name"], ""
        if result := results.get(name):
            took = f" in {result.seconds / 60:.1f} min" if result.seconds >= 60 else f" in {result.seconds:.1f} s"
            if expected := audited.expected.get(name):
                took += f" ({100 * (result.seconds / expected - 1):+.0f} % of the estimate)"
        handover = f", handover {segment['handover']}" if segment["handover"] else ""
        rates = ", ".join(f"{group} {rate}" for group, rate in segment["lr"].items())
        yield f"{name}: {segment['steps']:,} steps{took}{handover}; {rates}"


def _outcome(audited: StageAudit) -> Iterator[str]:
    """The verdict, the attempts unless there was a single one that finished, and the problems."""
    record = audited.stage.record
    if record.result:
        yield ": ".join(filter(None, (record.result.verdict, "; ".join(record.result.reasons))))
    if record.status != "done" or len(record.attempts) > 1:
        for attempt in record.attempts:
            ended = "runs, or was killed" if attempt.state == "running" else attempt.state
            yield f"{attempt.how}; {attempt.reason or ended}"
    yield from audited.problems


def to_json(chains: Iterable[ChainAudit]) -> list[dict[str, Any]]:
    """All records and results of the audit."""
    return [
        {
            **{name: getattr(chain.record, name) for name in ("key", "recipe", "lmbda", "seed")},
            "stages": [
                {
                    **asdict(audited.stage.record),
                    "folder": str(audited.stage.folder),
                    "place": audited.stage.place,
                    "verified": audited.files,
                    "problems": audited.problems,
                    "expected_seconds": audited.expected,
                }
                for audited in chain.stages
            ],
        }
        for chain in chains
    ]
