"""Progress of a run and its estimated time left."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.chain.chain import PlannedStage
from pipeline.commands.display import console, errors
from pipeline.recipes.schema import Segment
from pipeline.training.watcher import Watcher

STEPS_TIMED = 50
"""Number of latest steps over which the time of a step is averaged."""
LINE_EVERY = 30.0
"""Seconds between two lines if there is no terminal."""


@dataclass(frozen=True)
class TimeLeft:
    """Seconds left in a segment, its stage and the chain."""

    segment: float
    stage: float
    chain: float

    def __str__(self) -> str:
        return f"left: segment {duration(self.segment)}, stage {duration(self.stage)}, chain {duration(self.chain)}"


class Forecast:
    """Estimates the time left from the speed of the latest steps and the schedules of the stages to train.

    A later segment is assumed to be as fast as the last one with the same objective and trained parameters, or as the
    present segment if there was none. Evaluations are not counted.
    """

    def __init__(self, todo: Iterable[tuple[str, Segment]]) -> None:
        self.todo = deque(todo)
        """The present segment and those after it, each with its stage's name."""
        self._ends: deque[float] = deque(maxlen=STEPS_TIMED)
        self._done = 0
        self._known: dict[tuple[str, str], float] = {}

    def begin(self, segment: Segment, done: int) -> None:
        """Begin a segment after `done` of its steps. Segments before it in the list are dropped."""
        # Stages may have equal segments: if the present one had steps, a later one is meant.
        first = 1 if self._ends else 0
        found = [index for index, (_, planned) in enumerate(self.todo) if index >= first and planned == segment]
        for _ in range(found[0] if found else 0):
            self.todo.popleft()
        self._done = done
        self._ends.clear()

    def step(self, now: float) -> None:
        """Record that a step ended at the time `now`, in seconds."""
        self._done += 1
        self._ends.append(now)
        if len(self._ends) > 1 and self.todo:
            self._known[_sort(self.todo[0][1])] = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def left(self) -> TimeLeft | None:
        """The time left; None before two steps were timed."""
        if not self.todo or _sort(self.todo[0][1]) not in self._known:
            return None
        stage, present = self.todo[0]
        pace = self._known[_sort(present)]
        times = [(stage, pace * (present.steps - self._done))]
        times += [(name, self._known.get(_sort(s), pace) * s.steps) for name, s in list(self.todo)[1:]]
        of_stage = sum(seconds for name, seconds in times if name == stage)
        return TimeLeft(times[0][1], of_stage, sum(seconds for _, seconds in times))


def _sort(segment: Segment) -> tuple[str, str]:
    return segment.objective, str(segment.train)


def to_train(plan: Sequence[PlannedStage], force: bool = False) -> list[tuple[str, Segment]]:
    """Segments of the stages to train, each with its stage's name. `force` adds the last one even if it is done."""
    return [
        (planned.name, segment)
        for planned in plan
        if (planned.status != "done" or (force and planned is plan[-1])) and planned.task.imported is None
        for segment in planned.task.stage.schedule
    ]


def duration(seconds: float) -> str:
    """A time in one or two units: `40 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


class ProgressWatcher(Watcher):
    """Shows loss, rate, PSNR and time left on standard error: a bar at a terminal, a line every 30 s elsewhere.

    With `every_line`, a line is also printed for all new values.
    """

    def __init__(self, todo: Iterable[tuple[str, Segment]] = (), every_line: bool = False) -> None:
        self.forecast, self.every_line = Forecast(todo), every_line
        self.bar = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=errors,
            transient=True,
            disable=not errors.is_terminal or errors.quiet,
            redirect_stdout=console.is_terminal,
        )
        self.task = self.bar.add_task("", values="")
        self.name, self.done, self.total = "", 0, 0
        self._last_line = time.monotonic()

    def __enter__(self) -> "ProgressWatcher":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def segment(self, segment: Segment, done: int) -> None:
        self.name, self.done, self.total = segment.name, done, segment.steps
        self.forecast.begin(segment, done)
        self.bar.reset(self.task, description=segment.name, total=segment.steps, completed=done, values="")

    def step(self, values: dict[str, float] | None) -> None:
        now = time.monotonic()
        self.done += 1
        self.forecast.step(now)
        self.bar.update(self.task, completed=self.done)
        if not values:
            return
        left = self.forecast.left()
        text = "  ".join(filter(None, (_values(values), str(left) if left else "")))
        self.bar.update(self.task, values=text)
        seldom = not errors.is_terminal and (now - self._last_line >= LINE_EVERY or self.done == self.total)
        if self.every_line or seldom:
            errors.print(f"  {self.name} {self.done}/{self.total}  {text}", soft_wrap=True)
            self._last_line = now

    def note(self, line: str) -> None:
        console.print(f"  {line}", soft_wrap=True)


def _values(values: dict[str, float]) -> str:
    shown = [
        ("loss", "loss {:.4f}"),
        ("bpp", "estimated {:.4f} bpp"),
        ("psnr_db", "{:.2f} dB"),
        ("step_seconds", "{:.2f} s/step"),
    ]
    return "  ".join(form.format(values[key]) for key, form in shown if key in values)
