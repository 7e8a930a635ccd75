"""What a person at the terminal sees: progress, the plan, the closing table."""

import json
import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.chain.chain import Chain, PlannedStage
from pipeline.common.tables import Table, number
from pipeline.recipes.schema import Segment
from pipeline.training.watcher import Watcher

# Of the processes that `accelerate launch` starts, the first alone speaks.
console = Console(highlight=False, markup=False, quiet=os.environ.get("RANK", "0") != "0")


class ProgressWatcher(Watcher):
    """A bar with loss, rate, PSNR and time left; lines instead where the output is no terminal."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", values="")
        self.name, self.done, self.total = "", 0, 0

    def __enter__(self) -> "ProgressWatcher":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def segment(self, segment: Segment, done: int) -> None:
        self.name, self.done, self.total = segment.name, done, segment.steps
        self.bar.reset(self.task, description=segment.name, total=segment.steps, completed=done, values="")

    def step(self, values: dict[str, float] | None) -> None:
        self.done += 1
        self.bar.update(self.task, completed=self.done)
        if values:
            text = _values(values)
            self.bar.update(self.task, values=text)
            if not console.is_terminal:
                console.print(f"  {self.name} {self.done}/{self.total}  {text}")

    def note(self, line: str) -> None:
        console.print(f"  {line}", soft_wrap=True)


def _values(values: dict[str, float]) -> str:
    shown = [
        ("loss", "loss {:.4f}"),
        ("bpp", "{:.4f} bpp"),
        ("psnr_db", "{:.2f} dB"),
        ("step_seconds", "{:.2f} s/step"),
    ]
    return "  ".join(form.format(values[key]) for key, form in shown if key in values)


def plan_table(chain: Chain, plan: Sequence[PlannedStage]) -> Table:
    """What `hpcm plan` prints."""
    title = f"{chain.recipe}, λ = {chain.lmbda:g}, in {chain.folder}"
    table = Table(title, ("stage", "status", "why", "segments (steps)"), left=4)
    for planned in plan:
        segments = ", ".join(f"{segment.name} ({segment.steps:,})" for segment in planned.task.stage.schedule)
        if planned.task.imported is not None:
            segments = f"taken from {planned.task.imported}"
        table.add(planned.name, planned.status, planned.reason.removeprefix("stale: "), segments)
    return table


def closing_table(chain: Chain) -> Table:
    """One line per published stage: size, cost, quality, step-0 gap, minutes of training."""
    columns = ("stage", "params", "kMAC/px", "bpp", "PSNR dB", "MS-SSIM", "R-D loss", "step-0", "min")
    table = Table(f"{chain.recipe}, λ = {chain.lmbda:g}", columns)
    for task in chain.tasks:
        if task.record.is_file():
            table.add(task.stage.name, *_record_row(json.loads(task.record.read_text())))
    return table


def _record_row(record: dict[str, Any]) -> list[str]:
    quality, gap = record["quality"], record["facts"].get("step0_gap")
    return [
        f"{record['parameters'] / 1e6:.2f}M",
        f"{record['kmacs_per_pixel']:.1f}",
        f"{quality['bpp']:.4f}",
        f"{quality['psnr_db']:.2f}",
        number(quality["ms_ssim"]),
        f"{quality['rd_loss']:.4f}",
        number(gap, "+.4f"),
        f"{record['training_seconds'] / 60:.1f}" if record["steps"] else "–",
    ]
