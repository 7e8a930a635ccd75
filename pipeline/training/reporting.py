"""What receives the progress of a training: records, a person, and a meter that averages and notices explosions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from torch.optim import Optimizer

from pipeline.evaluation.metrics import metric_named
from pipeline.recipes.registered import OBJECTIVES
from pipeline.recipes.schema import Segment, Stage
from pipeline.records.metrics import MetricsLog
from pipeline.weights.published import Quality
from pipeline.weights.training_state import Progress

LOSSES_KEPT = 32
"""Number of recent losses in the running median."""
EXPLODED = 10.0
"""A loss above this many times the median is reported as exploding."""


class Watcher:
    """Shows the progress of training to a person. This base class shows nothing."""

    def segment(self, segment: Segment, done: int) -> None:
        """A segment begins or resumes, after `done` steps."""

    def step(self, values: dict[str, float] | None) -> None:
        """A step has ended. `values` are the means since the last report; None between reports."""

    def image(self, done: int, total: int) -> None:
        """A validation image begins, after `done` of `total` images."""

    def note(self, line: str) -> None:
        """Show a line of text."""


@dataclass(frozen=True)
class Reporting:
    """Receivers of progress, and the function that measures the child on the validation images."""

    metrics: MetricsLog = field(default_factory=MetricsLog)
    watcher: Watcher = field(default_factory=Watcher)
    measure: Callable[[], Quality] | None = None
    """Only the first process calls it. Without it nothing is validated."""
    saved: Callable[[Progress], None] = lambda progress: None
    """A state was saved."""
    segment_ended: Callable[[str, int, Progress, Quality], None] = lambda name, steps, progress, quality: None
    """A segment of this name and number of steps was trained and validated."""

    def validated(self, title: str, quality: Quality, step: int) -> None:
        """Log a validation at a step of the stage."""
        self.metrics.append(quality.metrics("val"), step)
        self.watcher.note(f"{title}: validation loss {quality.rd_loss:.4f}, estimated {quality.text()}")


class Meter:
    """Receives the outcome of every step. Every `log_every` steps it logs the means since the last report."""

    def __init__(self, stage: Stage, segment: Segment, optimizer: Optimizer, reporting: Reporting):
        self.stage, self.segment, self.optimizer, self.reporting = stage, segment, optimizer, reporting

    def count(self, progress: Progress, values: Mapping[str, float] | None, seconds: float) -> Progress:
        """Progress after a step with these values of the objective; None if the step was skipped."""
        window = dict(progress.window)
        for key, value in {**values, "step_seconds": seconds}.items() if values is not None else ():
            window[key] = window.get(key, 0.0) + value
        window["count"] = window.get("count", 0) + (values is not None)
        progress = replace(
            self._with_loss(progress, values["loss"]) if values is not None else progress,
            step=progress.step + 1,
            stage_step=progress.stage_step + 1,
            bad_steps=progress.bad_steps + (values is None),
            consecutive_bad=progress.consecutive_bad + 1 if values is None else 0,
            seconds=progress.seconds + seconds,
            window=window,
        )
        due = progress.stage_step % self.stage.log_every == 0 or progress.step == self.segment.steps
        self.reporting.watcher.step(self._report(progress) if due else None)
        return replace(progress, window={}) if due else progress

    def _with_loss(self, progress: Progress, loss: float) -> Progress:
        """Add a loss to the recent ones. An exploding loss is reported and counted."""
        before = progress.losses
        known = OBJECTIVES[self.segment.objective].steady and len(before) == LOSSES_KEPT
        exploded = known and loss > EXPLODED * median(before)
        if exploded:
            self.reporting.watcher.note(
                f"{self.segment.name}, step {progress.step + 1}: the loss explodes: {loss:.4g}; the median "
                f"of the last {LOSSES_KEPT} steps is {median(before):.4g}"
            )
        losses = [*before, loss][-LOSSES_KEPT:]
        return replace(progress, losses=losses, exploded_steps=progress.exploded_steps + exploded)

    def _report(self, progress: Progress) -> dict[str, float]:
        """Log the means since the last report, under names with segment and unit. Returns them by short names."""
        count = progress.window["count"]
        values = {key: value / count for key, value in progress.window.items() if key != "count"} if count else {}
        if "distortion" in values:
            metric = metric_named(self.stage.metric)
            values[metric.shown_as or metric.name] = metric.shown(values.pop("distortion"))
        groups = [group for group in self.optimizer.param_groups if group["key"].isidentifier()]
        logged = {
            **values,
            **{f"lr_{group['key']}": group["lr"] for group in groups},
            "skipped_steps": float(progress.bad_steps),
            "exploded_steps": float(progress.exploded_steps),
        }
        named = {f"train/{self.segment.name}/{key}": value for key, value in logged.items()}
        self.reporting.metrics.append(named, progress.stage_step)
        return values
