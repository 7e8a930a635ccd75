"""The report's tables: what each stage did, what it achieved, and its gain against its control."""

from collections.abc import Callable, Iterable, Sequence

from pipeline.common.tables import Table, shortest
from pipeline.evidence.gains import Gain, Spread
from pipeline.records.chains import ChainRecord
from pipeline.records.record import StageRecord

Value = Callable[[StageRecord], float | None]


def story_table(chains: Sequence[ChainRecord]) -> Table:
    """What each stage replaced and trained, and its loss minus its parent's before and after each segment."""
    groups = _groups(chains)
    children = sorted((r for _, _, records in groups for r in records if r.parent), key=lambda r: -len(r.schedule))
    segments = list(dict.fromkeys(segment["name"] for record in children for segment in record.schedule))
    table = Table(
        "What each stage did, and its loss minus its parent's",
        ("λ", "stage", "parent", "new components", "steps", "minutes", "step 0", *(f"after {s}" for s in segments)),
        left=4,
    )
    for lmbda, name, records in groups:
        first = records[0]
        losses = [_over(records, value) for value in (lambda r: r.start.step0_gap, *map(_loss_after, segments))]
        steps = f"{first.steps:,}" if not first.imported else "imported"
        minutes = _over(records, lambda record: record.trained.seconds / 60, ".1f")
        before = first.parent_codec
        new = "–" if before is None else ", ".join(key for key in first.codec if first.codec[key] != before.get(key))
        table.add(shortest(lmbda), name, first.parent or "–", new, steps, minutes, *losses)
    return table


def quality_table(chains: Sequence[ChainRecord]) -> Table:
    """Quality and cost of every stage at every λ: mean ± standard deviation over seeds."""
    columns = ("R-D loss", "coded bpp", "PSNR dB", "MS-SSIM", "parameters", "kMAC/pixel")
    table = Table("Real bitstreams of whole validation images", ("λ", "stage", "seeds", *columns), left=2)
    values: list[tuple[Value, str]] = [
        (lambda record: record.evaluated.quality.rd_loss, ".4f"),
        (lambda record: record.evaluated.quality.bpp, ".4f"),
        (lambda record: record.evaluated.quality.psnr_db, ".2f"),
        (lambda record: record.evaluated.quality.ms_ssim, ".4f"),
    ]
    for lmbda, name, records in _groups(chains):
        cells = [_over(records, value, form) for value, form in values]
        result = records[0].evaluated
        cells += [f"{result.parameters / 1e6:.2f} M", f"{result.kmacs_per_pixel:.1f}"]
        table.add(shortest(lmbda), name, str(len(records)), *cells)
    return table


def gains_table(found: Iterable[Gain]) -> Table:
    """Every stage that has a control against it."""
    columns = ("λ", "stage", "control", "seeds", "Δ loss", "rate at equal PSNR %")
    table = Table("Stages against their controls", columns, left=3)
    for gain in found:
        rate = gain.rate_percent.text("+.2f") if gain.rate_percent else "–"
        table.add(shortest(gain.lmbda), gain.stage, gain.control, str(gain.loss.count), gain.loss.text("+.4f"), rate)
    return table


def _groups(chains: Sequence[ChainRecord]) -> list[tuple[float, str, list[StageRecord]]]:
    """Published stages grouped by λ and name, one per seed."""
    names = list(dict.fromkeys(name for chain in chains for name in chain.published))
    found = []
    for lmbda in sorted({chain.lmbda for chain in chains}):
        here = [chain.published for chain in chains if chain.lmbda == lmbda]
        groups = ((name, [published[name].record for published in here if name in published]) for name in names)
        found += [(lmbda, name, records) for name, records in groups if records]
    return found


def _over(records: Sequence[StageRecord], value: Value, form: str = "+.4f") -> str:
    """Mean ± deviation over the records that have the value, or a dash."""
    values = [x for x in map(value, records) if x is not None]
    return Spread.of(values).text(form) if values else "–"


def _loss_after(name: str) -> Value:
    def value(record: StageRecord) -> float | None:
        losses = [result.quality.rd_loss for result in record.segments if result.name == name]
        return losses[0] - record.start.parent.rd_loss if losses and record.start.parent else None

    return value
