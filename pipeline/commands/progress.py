"""Progress of a run and its estimated time left."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from pipeline.chain.plan import PlannedStage
from pipeline.commands.display import console, errors, print_above_bar
from pipeline.recipes.schema import Segment
from pipeline.training.watcher import Watcher

STEPS_TIMED = 50
"""Number of latest steps over which the time of a step is averaged."""
STEPS_BEFORE_FORECAST = 5
"""Number of steps after which the time of the whole training is printed."""
COST_OF_FROZEN_STEP = 0.4
"""Time of a step with frozen parameters, relative to one that trains all: 0.4 to 0.6 for `tiny` on a CPU."""
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

    A later segment is assumed to be as fast as the last one with the same objective and trained parameters. If there is
    none, its speed is estimated from that of the present segment. Evaluations between segments are assumed to take as
    long as the last one; before the first they are not counted.
    """

    def __init__(self, todo: Iterable[tuple[str, Segment]]) -> None:
        self.todo = deque(todo)
        """The present segment and those after it, each with its stage's name."""
        self._ends: deque[float] = deque(maxlen=STEPS_TIMED)
        self._done = 0
        self._known: dict[tuple[str, str], float] = {}
        self._pauses = {True: 0.0, False: 0.0}
        """Seconds between the last step of a segment and the next step, by whether the segment ends its stage."""
        self._paused_since: tuple[bool, float] | None = None

    def begin(self, segment: Segment, done: int) -> None:
        """Begin a segment after `done` of its steps. Segments before it in the list are dropped."""
        # Stages may have equal segments: if the present one had steps, a later one is meant.
        first = 1 if self._ends else 0
        found = [index for index, (_, planned) in enumerate(self.todo) if index >= first and planned == segment]
        if found and self._ends:
            self._paused_since = (self._ends_stage(0), self._ends[-1])
        for _ in range(found[0] if found else 0):
            self.todo.popleft()
        self._done = done
        self._ends.clear()

    def step(self, now: float) -> None:
        """Record that a step ended at the time `now`, in seconds."""
        self._done += 1
        self._ends.append(now)
        if self._paused_since is not None:
            ends_stage, since = self._paused_since
            self._pauses[ends_stage], self._paused_since = now - since, None
        if len(self._ends) > 1 and self.todo:
            self._known[_sort(self.todo[0][1])] = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def left(self) -> TimeLeft | None:
        """The time left; None before two steps were timed."""
        if not self.todo or _sort(self.todo[0][1]) not in self._known:
            return None
        present, times = self.todo[0], []
        for index, (name, segment) in enumerate(self.todo):
            steps = segment.steps - (self._done if index == 0 else 0)
            times.append((name, self._pace(segment) * steps, self._pauses[self._ends_stage(index)]))
        of_stage = sum(steps + pause for name, steps, pause in times if name == present[0])
        return TimeLeft(times[0][1], of_stage, sum(steps + pause for _, steps, pause in times))

    def _pace(self, segment: Segment) -> float:
        """Seconds of a step of a segment."""
        present = self.todo[0][1]
        return self._known.get(_sort(segment), self._known[_sort(present)] * _cost(segment) / _cost(present))

    def _ends_stage(self, index: int) -> bool:
        return index + 1 == len(self.todo) or self.todo[index][0] != self.todo[index + 1][0]


def _cost(segment: Segment) -> float:
    """The time of a step, relative to a step that trains all parameters."""
    return 1.0 if segment.train == "all" else COST_OF_FROZEN_STEP


def _sort(segment: Segment) -> tuple[str, str]:
    return segment.objective, str(segment.train)


def to_train(plan: Sequence[PlannedStage]) -> list[tuple[str, Segment]]:
    """Segments of the stages to train, each with its stage's name."""
    return [(planned.name, segment) for planned in plan if planned.trains for segment in planned.task.stage.schedule]


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
        self._training, self._timed, self._last_line = False, 0, time.monotonic()

    def __enter__(self) -> "ProgressWatcher":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def segment(self, segment: Segment, done: int) -> None:
        self.name, self.done, self.total = segment.name, done, segment.steps
        self.forecast.begin(segment, done)
        self._show_training()

    def step(self, values: dict[str, float] | None) -> None:
        now = time.monotonic()
        self.done += 1
        self.forecast.step(now)
        self._foretell()
        if not self._training:
            self._show_training()
        left = self.forecast.left()
        time_left = str(left) if left else ""
        self.bar.update(self.task, completed=self.done, left=time_left)
        if not values:
            return
        self.bar.update(self.task, values=_values(values))
        if self.every_line or self._is_time(now) or (self.done == self.total and not errors.is_terminal):
            text = "  ".join(filter(None, (_values(values), time_left)))
            self._line(f"{self.name} {self.done}/{self.total}  {text}", now)

    def image(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._training or done == 0:
            self.bar.reset(
                self.task, description="validation", total=total, visible=True, left="", values="", completed=done
            )
            self._training = False
        self.bar.update(self.task, completed=done)
        if self._is_time(now):
            self._line(f"validation: image {done + 1} of {total}", now)

    def note(self, line: str) -> None:
        print_above_bar(f"  {line}")

    def _show_training(self) -> None:
        self._training = True
        self.bar.reset(
            self.task, description=self.name, total=self.total, visible=True, left="", values="", completed=self.done
        )

    def _foretell(self) -> None:
        """Print once how long the training will take."""
        self._timed += 1
        if self._timed == STEPS_BEFORE_FORECAST and (left := self.forecast.left()):
            print_above_bar(f"  the training will take about {duration(left.chain)}, and evaluations some more", errors)

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
