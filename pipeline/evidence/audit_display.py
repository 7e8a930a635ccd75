"""An audit as tables and as JSON."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pipeline.common.tables import Table, number
from pipeline.evidence.audit import ChainAudit, StageAudit
from pipeline.tracking.records import SegmentRecord


def tables(chain: ChainAudit) -> Iterable[Table]:
    """Two tables per chain: the result of each stage, and how it was built."""
    title = f"{chain.record.title}: {chain.record.state.lower()}"
    results = Table(title, ("stage", "parent", "loss in", "step 0", "out", "coded bpp", "PSNR dB", "files"), left=2)
    story = Table("how it was built", ("stage", "transferred", "trained", "outcome"), left=4)
    for stage in chain.stages:
        results.add(*_result_cells(stage))
        record = stage.record
        trained = "\n".join(segment_text(s, stage.expected.get(s.name)) for s in record.segments) or "taken from a file"
        story.add(record.name, (record.tags.ledger or "–").replace(", ", "\n"), trained, _history(stage))
    yield results
    yield story


def segment_text(segment: SegmentRecord, expected: float | None = None) -> str:
    """`frozen: 60 steps in 0.3 min (-5 % of the estimate), handover 40; new 0.001`."""
    minutes = "" if segment.seconds is None else f" in {segment.seconds / 60:.1f} min"
    if segment.seconds is not None and expected:
        minutes += f" ({100 * (segment.seconds / expected - 1):+.0f} % of the estimate)"
    handover = f", handover {segment.handover}" if segment.handover else ""
    rates = ", ".join(f"{group} {rate}" for group, rate in segment.rates.items())
    return f"{segment.name}: {segment.steps:,} steps{minutes}{handover}; {rates}"


def _result_cells(stage: StageAudit) -> list[str]:
    record = stage.record
    achieved = vars(record.quality) if record.quality else {}
    return [
        record.name,
        record.parent or "–",
        number(record.parent_loss),
        number(record.step0_loss),
        number(achieved.get("rd_loss")),
        number(achieved.get("bpp")),
        number(achieved.get("psnr_db"), ".2f"),
        stage.files,
    ]


def _history(stage: StageAudit) -> str:
    tags = stage.record.tags
    state = stage.record.state.lower() if stage.record.state != "FINISHED" else ""
    attempts = stage.record.attempts
    # A single successful attempt is not shown.
    told = attempts if state or len(attempts) > 1 else []
    verdict = tags.acceptance or ""
    return "\n".join(filter(None, (state, verdict, *told, *stage.problems))) or "–"


def to_json(chains: Iterable[ChainAudit]) -> list[dict[str, Any]]:
    """All records and results of the audit."""
    return [
        {
            **{key: getattr(chain.record, key) for key in ("recipe", "lmbda", "seed", "state", "run_id")},
            "stages": [_stage_json(stage) for stage in chain.stages],
        }
        for chain in chains
    ]


def _stage_json(stage: StageAudit) -> dict[str, Any]:
    record = stage.record
    return {
        "name": record.name,
        "parent": record.parent,
        "state": record.state,
        "run_id": record.run_id,
        "ledger": _counts(record.tags.ledger or ""),
        "segments": [asdict(segment) for segment in record.segments],
        "loss": {"parent": record.parent_loss, "step0": record.step0_loss},
        "quality": asdict(record.quality) if record.quality else None,
        "seconds": record.seconds,
        "expected_seconds": stage.expected,
        "attempts": record.attempts,
        "acceptance": record.tags.acceptance,
        "inputs": record.tags.inputs,
        "checkpoint": record.tags.checkpoint,
        "digest": record.digest,
        "files": stage.files,
        "problems": list(stage.problems),
    }


def _counts(ledger: str) -> dict[str, int]:
    """`12 copied, 3 dropped` as a mapping."""
    pairs = (part.split(" ", 1) for part in ledger.split(", ") if part)
    return {kind: int(count) for count, kind in pairs}
