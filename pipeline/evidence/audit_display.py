"""An audit as tables and as JSON."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from pipeline.common.tables import Table
from pipeline.evaluation.results import cells
from pipeline.evidence.audit import ChainAudit, StageAudit


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
