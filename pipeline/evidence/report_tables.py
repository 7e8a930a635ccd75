"""The report's tables: stages against their references, and losses during a migration."""

from collections.abc import Callable, Sequence

from pipeline.common.tables import Table, shortest
from pipeline.evidence.control_gains import Spread, gains
from pipeline.tracking.records import ChainRecord, StageRecord


def quality_table(chains: Sequence[ChainRecord]) -> Table:
    """Every stage at every λ: mean ± standard deviation over seeds, and the gain against its reference."""
    table = Table(
        "Real bitstreams of whole validation images",
        ("λ", "stage", "against", "seeds", "Δ loss", "rate at equal PSNR %", "R-D loss", "coded bpp", "PSNR dB",
         "MS-SSIM"),
        left=3,
    )  # fmt: skip
    found = {(gain.lmbda, gain.stage): gain for gain in gains(chains)}
    for lmbda, name, stages in _groups(chains):
        gain = found.get((lmbda, name))
        cells = [_over(stages, _quality(key), form) for key, form in
                 (("rd_loss", ".4f"), ("bpp", ".4f"), ("psnr_db", ".2f"), ("ms_ssim", ".4f"))]  # fmt: skip
        fair = gain is not None and gain.fair
        change = (_text(gain.loss, "+.4f"), _text(gain.rate_percent, "+.2f")) if gain and fair else ("–", "–")
        reference = "–" if gain is None else gain.reference if fair else "no control"
        table.add(shortest(lmbda), name, reference, str(len(stages)), *change, *cells)
    return table


def migration_table(chains: Sequence[ChainRecord]) -> Table:
    """Loss minus the parent's, estimated on the validation images: before the first step and after each segment."""
    groups = [group for group in _groups(chains) if group[2][0].parent_loss is not None]
    longest_first = sorted((stage.segments for _, _, stages in groups for stage in stages), key=len, reverse=True)
    segments = list(dict.fromkeys(segment.name for schedule in longest_first for segment in schedule))
    table = Table(
        "Estimated loss minus the parent's",
        ("λ", "stage", "parent", "seeds", "step 0", *(f"after {name}" for name in segments), "step, frozen : unfrozen"),
        left=3,
    )
    for lmbda, name, stages in groups:
        after = [_over(stages, _loss_after(segment), "+.4f") for segment in segments]
        step0 = _over(stages, _step0, "+.4f")
        ratio = _over(stages, _frozen_share, ".2f")
        table.add(shortest(lmbda), name, stages[0].parent or "–", str(len(stages)), step0, *after, ratio)
    return table


def _groups(chains: Sequence[ChainRecord]) -> list[tuple[float, str, list[StageRecord]]]:
    """Published stages grouped by λ and name, one per seed."""
    names = list(dict.fromkeys(name for chain in chains for name in chain.published))
    found = []
    for lmbda in sorted({chain.lmbda for chain in chains}):
        for name in names:
            stages = [chain.published[name] for chain in chains if chain.lmbda == lmbda and name in chain.published]
            if stages:
                found.append((lmbda, name, stages))
    return found


def _over(stages: Sequence[StageRecord], value: Callable[[StageRecord], float | None], form: str) -> str:
    """Mean ± deviation over the stages that have the value, or a dash."""
    spread = Spread.of([x for x in map(value, stages) if x is not None])
    return _text(spread, form)


def _text(spread: Spread | None, form: str) -> str:
    return spread.text(form) if spread else "–"


def _quality(key: str) -> Callable[[StageRecord], float | None]:
    return lambda stage: getattr(stage.quality, key)


def _step0(stage: StageRecord) -> float | None:
    if stage.step0_loss is None or stage.parent_loss is None:
        return None
    return stage.step0_loss - stage.parent_loss


def _loss_after(name: str) -> Callable[[StageRecord], float | None]:
    def value(stage: StageRecord) -> float | None:
        losses = [segment.loss for segment in stage.segments if segment.name == name and segment.loss is not None]
        return losses[0] - stage.parent_loss if losses and stage.parent_loss is not None else None

    return value


def _frozen_share(stage: StageRecord) -> float | None:
    """Time of a frozen step divided by that of an unfrozen step."""
    times = {
        segment.name: segment.seconds / segment.steps for segment in stage.segments if segment.seconds and segment.steps
    }
    return times["frozen"] / times["unfrozen"] if times.keys() >= {"frozen", "unfrozen"} else None
