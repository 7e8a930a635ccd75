"""The interface that shows training to a person."""

from pipeline.recipes.schema import Segment


class Watcher:
    """Receives the progress of training. This base class shows nothing."""

    def segment(self, segment: Segment, done: int) -> None:
        """A segment begins or resumes, after `done` steps."""

    def step(self, values: dict[str, float] | None) -> None:
        """A step has ended. `values` are the means since the last report; None between reports."""

    def image(self, done: int, total: int) -> None:
        """A validation image begins, after `done` of `total` images."""

    def note(self, line: str) -> None:
        """Show a line of text."""
