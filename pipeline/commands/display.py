"""What commands print: tables, the plan, the closing table."""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.common.packaged import label
from pipeline.common.tables import Table, number, shortest
from pipeline.records.record import StageRecord

if TYPE_CHECKING:
    from pipeline.chain.chain import Chain
    from pipeline.chain.plan import PlannedStage

# Only the first of the processes that `accelerate launch` starts prints.
_SILENT = os.environ.get("RANK", "0") != "0"
console = Console(highlight=False, markup=False, quiet=_SILENT)
"""Results, on standard output."""
errors = Console(highlight=False, markup=False, quiet=_SILENT, stderr=True)
"""Progress, on standard error."""


def hush() -> None:
    """Stop printing results and progress, for `--quiet`."""
    console.quiet = errors.quiet = True


def print_above_bar(line: str, to: Console | None = None) -> None:
    """Print a line of results, or to another console, above the progress bar if there is one.

    The bar is on standard error. If the other console printed to the same terminal, the bar's line would stay there.
    """
    to = to or console
    (errors if to.is_terminal and errors.is_terminal else to).print(line, soft_wrap=True)


def show(*tables: Table) -> None:
    """Print tables: framed and wrapped at a terminal, as plain columns elsewhere."""
    for table in tables:
        if console.is_terminal:
            console.print(table.rich())
        else:
            console.print(table.plain(), soft_wrap=True)


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def plan_table(chain: "Chain", plan: Sequence["PlannedStage"]) -> Table:
    """What `hpcm plan` prints."""
    title = f"{chain.recipe}, λ = {shortest(chain.lmbda)}, in {chain.folder}"
    table = Table(title, ("stage", "status", "why", "segments (steps)"), left=4)
    for planned in plan:
        segments = ", ".join(f"{segment.name} ({segment.steps:,})" for segment in planned.task.stage.schedule)
        if planned.task.imported is not None:
            segments = f"taken from {label(planned.task.imported)}"
        table.add(planned.name, planned.status, planned.reason.removeprefix(f"{planned.status}: "), segments)
    return table


def plan_json(chain: "Chain", plan: Sequence["PlannedStage"]) -> dict[str, Any]:
    """What `hpcm plan --json` prints."""
    return {
        "recipe": chain.recipe,
        "lmbda": chain.lmbda,
        "seed": chain.seed,
        "folder": str(chain.folder),
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


def closing_table(chain: "Chain") -> Table:
    """One row per published stage: size, cost, quality, step-0 gap and minutes of training."""
    columns = ("stage", "params", "kMAC/px", "coded bpp", "PSNR dB", "MS-SSIM", "R-D loss", "step-0", "min")
    table = Table(f"{chain.recipe}, λ = {shortest(chain.lmbda)}", columns)
    for task in chain.tasks:
        if task.is_published:
            table.add(task.stage.name, *_record_row(StageRecord.read(task.folder)))
    return table


def _record_row(record: StageRecord) -> list[str]:
    assert record.result is not None  # a published stage was evaluated
    result, quality = record.result, record.result.quality
    return [
        f"{result.parameters / 1e6:.2f}M",
        f"{result.kmacs_per_pixel:.1f}",
        f"{quality.bpp:.4f}",
        f"{quality.psnr_db:.2f}",
        number(quality.ms_ssim),
        f"{quality.rd_loss:.4f}",
        number(record.start.step0_gap, "+z.4f"),
        f"{record.trained.seconds / 60:.1f}" if record.steps else "–",
    ]
