"""Progress of a run, and the time left at its present speed."""

import time
from collections import deque

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from pipeline.commands.display import console, duration, errors, print_above_bar
from pipeline.recipes.schema import Segment
from pipeline.training.reporting import Watcher

STEPS_TIMED = 50
"""Number of latest steps over which the time of a step is averaged."""
LINE_EVERY = 30.0
"""Seconds between two lines if there is no terminal."""


class ProgressWatcher(Watcher):
    """Shows loss, rate, PSNR and time left on standard error: a bar at a terminal, a line every 30 s elsewhere.

    `steps` are those of the whole chain that are left. With `every_line`, a line is also printed for all new values.
    """

    def __init__(self, steps: int = 0, every_line: bool = False) -> None:
        self.steps, self.every_line = steps, every_line
        self.bar = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[values]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=errors,
            transient=True,
            disable=not errors.is_terminal or errors.quiet,
            redirect_stdout=console.is_terminal,
        )
        self.task = self.bar.add_task("", visible=False, left="", values="")
        self.name, self.done, self.total = "", 0, 0
        self._ends: deque[float] = deque(maxlen=STEPS_TIMED)
        self._training, self._last_line = False, time.monotonic()

    def __enter__(self) -> "ProgressWatcher":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def segment(self, segment: Segment, done: int) -> None:
        self.name, self.done, self.total = segment.name, done, segment.steps
        self._ends.clear()
        self._begin(self.name, done, segment.steps)

    def step(self, values: dict[str, float] | None) -> None:
        now = time.monotonic()
        self.done, self.steps = self.done + 1, self.steps - 1
        self._ends.append(now)
        if not self._training:
            self._begin(self.name, self.done, self.total)
        self.bar.update(self.task, completed=self.done, left=self.time_left)
        if not values:
            return
        self.bar.update(self.task, values=_values(values))
        if self.every_line or self._is_time(now) or (self.done == self.total and not errors.is_terminal):
            text = "  ".join(filter(None, (_values(values), self.time_left)))
            self._line(f"{self.name} {self.done}/{self.total}  {text}", now)

    def image(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._training or done == 0:
            self._begin("validation", done, total)
            self._training = False
        self.bar.update(self.task, completed=done)
        if self._is_time(now):
            self._line(f"validation: image {done + 1} of {total}", now)

    def note(self, line: str) -> None:
        print_above_bar(f"  {line}")

    @property
    def time_left(self) -> str:
        """The time of the steps left, as fast as the latest ones; empty before two steps of a segment."""
        if len(self._ends) < 2:
            return ""
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        segment, chain = (duration(pace * max(steps, 0)) for steps in (self.total - self.done, self.steps))
        return f"left at this speed: segment {segment}, chain {chain}"

    def _begin(self, what: str, done: int, total: int) -> None:
        self._training = True
        self.bar.reset(self.task, description=what, completed=done, total=total, visible=True, left="", values="")

    def _is_time(self, now: float) -> bool:
        """Whether a line is due, without a terminal."""
        return not errors.is_terminal and now - self._last_line >= LINE_EVERY

    def _line(self, text: str, now: float) -> None:
        print_above_bar(f"  {text}", errors)
        self._last_line = now


def _values(values: dict[str, float]) -> str:
    shown = [
        ("loss", "loss {:.4f}"),
        ("bpp", "estimated {:.4f} bpp"),
        ("psnr_db", "{:.2f} dB"),
        ("step_seconds", "{:.2f} s/step"),
    ]
    return "  ".join(form.format(values[key]) for key, form in shown if key in values)
