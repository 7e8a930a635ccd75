"""What a person sees of the training."""

from pipeline.recipes.schema import Segment


class Watcher:
    """Is told how the training goes; this one says nothing."""

    def segment(self, segment: Segment, done: int) -> None:
        """A segment begins, with `done` of its steps behind it."""

    def step(self, values: dict[str, float] | None) -> None:
        """A step is over; `values` are the means since the last time there were any."""

    def note(self, line: str) -> None:
        """Something worth a line."""
