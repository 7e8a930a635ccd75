"""Tables of chains: the plan before a run, and the results after it."""

from collections.abc import Sequence
from typing import Any

from pipeline.chain.chain import Chain
from pipeline.chain.plan import PlannedStage
from pipeline.common.packaged import label
from pipeline.common.tables import Table, number, shortest
from pipeline.evaluation.results import cells
from pipeline.records.record import StageRecord


def plan_table(chain: Chain, plan: Sequence[PlannedStage]) -> Table:
    """What `hpcm plan` prints."""
    title = f"{chain.recipe}, {chain.note or f'λ = {shortest(chain.lmbda)}'}, in {chain.folder}"
    code = "".join(f"\nruns the code of the plugin {name}: {file}" for name, file in chain.plugins.items())
    table = Table(f"{title}{code}\n{chain.doubt}".strip(), ("stage", "status", "why", "segments (steps)"), left=4)
    for planned in plan:
        segments = ", ".join(f"{segment.name} ({segment.steps:,})" for segment in planned.task.stage.schedule)
        if planned.task.imported is not None:
            segments = f"taken from {label(planned.task.imported)}"
        table.add(planned.name, planned.status, planned.reason.removeprefix(f"{planned.status}: "), segments)
    return table


def plan_json(chain: Chain, plan: Sequence[PlannedStage]) -> dict[str, Any]:
    """What `hpcm plan --json` prints."""
    return {
        "recipe": chain.recipe,
        "lmbda": chain.lmbda,
        "seed": chain.seed,
        "folder": str(chain.folder),
        "plugins": {name: str(file) for name, file in chain.plugins.items()},
        "stages": [
            {
                "name": planned.name,
                "status": planned.status,
                "reason": planned.reason,
                "imported": str(planned.task.imported) if planned.task.imported else None,
                "segments": [{"name": s.name, "steps": s.steps} for s in planned.task.stage.schedule],
            }
            for planned in plan
        ],
    }


def closing_table(chain: Chain) -> Table:
    """One row per published stage: size, cost, quality, step-0 gap and minutes of training."""
    columns = ("stage", "params", "kMAC/px", "coded bpp", "PSNR dB", "MS-SSIM", "R-D loss", "step-0", "min")
    records = [StageRecord.read(task.folder) for task in chain.tasks if task.is_published]
    names = dict.fromkeys(record.val_images.name for record in records)
    table = Table(f"{chain.recipe}, λ = {shortest(chain.lmbda)}, measured on {', '.join(names) or 'nothing'}", columns)
    for record in records:
        result = record.evaluated
        size = f"{result.parameters / 1e6:.2f}M", f"{result.kmacs_per_pixel:.1f}"
        minutes = f"{record.trained.seconds / 60:.1f}" if record.steps else "–"
        table.add(record.name, *size, *cells(result.quality), number(record.start.step0_gap, "+z.4f"), minutes)
    return table
