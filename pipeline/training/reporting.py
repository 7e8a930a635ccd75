"""What receives the progress of a training."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.recipes.schema import Segment
from pipeline.records.metrics import MetricsLog
from pipeline.weights.published import Quality
from pipeline.weights.training_state import Progress


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
