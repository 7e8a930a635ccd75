"""What a person at the terminal sees: progress, the plan, the closing table."""

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.chain import Chain, Planned
from pipeline.schema import Phase
from pipeline.trainer import Watcher

console = Console(highlight=False)


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

    def phase(self, phase: Phase, done: int) -> None:
        self.name, self.done, self.total = phase.name, done, phase.steps
        self.bar.reset(self.task, description=phase.name, total=phase.steps, completed=done, values="")

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


def plan_table(chain: Chain, plan: Sequence[Planned]) -> Table:
    """What `hpcm plan` prints."""
    table = Table(title=f"{chain.recipe}, λ = {chain.lmbda:g}, in {chain.folder}", title_justify="left")
    for column in ("stage", "status", "why", "phases (steps)"):
        table.add_column(column)
    for planned in plan:
        phases = ", ".join(f"{phase.name} ({phase.steps:,})" for phase in planned.job.stage.schedule)
        if planned.job.imported is not None:
            phases = f"taken from {planned.job.imported}"
        table.add_row(planned.name, planned.status, planned.reason, phases)
    return table


def closing_table(chain: Chain) -> Table:
    """One line per published stage: size, cost, quality, step-0 gap, minutes of training."""
    title = f"{chain.recipe}, λ = {chain.lmbda:g}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("stage", no_wrap=True)
    for column in ("params", "kMAC/px", "bpp", "PSNR dB", "MS-SSIM", "R-D loss", "step-0", "min"):
        table.add_column(column, justify="right", no_wrap=True)
    for job in chain.jobs:
        if job.record.is_file():
            table.add_row(job.stage.name, *_record_row(json.loads(job.record.read_text())))
    return table


def _record_row(record: dict[str, Any]) -> list[str]:
    quality, gap = record["quality"], record["facts"].get("step0_gap")
    return [
        f"{record['parameters'] / 1e6:.2f}M",
        f"{record['kmacs_per_pixel']:.1f}",
        f"{quality['bpp']:.4f}",
        f"{quality['psnr_db']:.2f}",
        f"{quality['ms_ssim']:.4f}" if quality["ms_ssim"] is not None else "–",
        f"{quality['rd_loss']:.4f}",
        f"{gap:+.4f}" if gap is not None else "–",
        f"{record['training_seconds'] / 60:.1f}" if record["steps"] else "–",
    ]
