"""Counts the steps of a segment, averages their values, and notices losses that explode."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from torch.optim import Optimizer

from pipeline.evaluation.metrics import metric_named
from pipeline.recipes.registered import OBJECTIVES
from pipeline.recipes.schema import Segment, Stage
from pipeline.training.reporting import Reporting
from pipeline.weights.training_state import Progress

LOSSES_KEPT = 32
"""Number of recent losses in the running median."""
EXPLODED = 10.0
"""A loss above this many times the median is reported as exploding."""


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
