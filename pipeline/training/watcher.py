"""The interface that shows training to a person."""

from pipeline.recipes.schema import Segment


class Watcher:
    """Receives the progress of training. This base class shows nothing."""

    def segment(self, segment: Segment, done: int) -> None:
        """A segment begins or resumes, after `done` steps."""

    def step(self, values: dict[str, float] | None) -> None:
        """A step has ended. `values` are the means since the last report; None between reports."""

    def note(self, line: str) -> None:
        """Show a line of text."""
