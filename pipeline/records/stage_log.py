"""Writes a stage's record and metrics while it runs."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipeline.common.files import readable
from pipeline.records import metrics
from pipeline.records.metrics import MetricsLog
from pipeline.records.record import FILE, Attempt, SegmentResult, Source, StageRecord, Trained
from pipeline.weights.published import Quality
from pipeline.weights.training_state import Progress


class StageLog:
    """The record and the metrics of a stage that runs. With `folder` None it writes nothing.

    All processes have one, so that they need not ask which of them writes; only the first has a folder.
    """

    def __init__(self, folder: Path | None, record: StageRecord):
        self.folder, self.record = folder, record
        self.metrics = MetricsLog(folder / metrics.FILE if folder else None)

    @classmethod
    def begin(cls, folder: Path | None, record: StageRecord, how: str, source: Source) -> "StageLog":
        """Begin an attempt. Continues the record in the folder, with its key and its earlier attempts, if there is one.

        Raises FileError for a damaged record.
        """
        earlier = StageRecord.read(folder) if folder and (folder / FILE).exists() else None
        if earlier:  # A resume does not load the root's file again, of which the lineage tells.
            known = earlier.lineage
            lineage = replace(
                record.lineage, imported_from=known.imported_from, filled_with_ones=known.filled_with_ones
            )
            record = replace(earlier, lineage=lineage, val_images=record.val_images)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        log = cls(folder, record)
        log.update(status="training", attempts=(*record.attempts, Attempt(int(1000 * time.time()), how, source)))
        return log

    def update(self, **changes: Any) -> None:
        """Change fields of the record, and write it. Raises FileError, also if the folder was moved or replaced."""
        self.record = replace(self.record, **changes)
        if self.folder is None:
            return
        self.metrics.check()
        self.record.write(self.folder)

    def saved(self, progress: Progress, **changes: Any) -> None:
        """Note how far the training has come, and change other fields of the record."""
        counts = progress.stage_step, progress.bad_steps, progress.exploded_steps
        self.update(trained=Trained(*counts, progress.seconds, progress.lines), **changes)

    def segment_ended(self, name: str, steps: int, progress: Progress, quality: Quality) -> None:
        """Add the result of a segment."""
        before = sum(result.seconds for result in self.record.segments)
        result = SegmentResult(name, steps, progress.seconds - before, quality)
        self.update(segments=(*self.record.segments[: progress.segment], result))

    def end(self, state: Literal["finished", "interrupted", "failed"], reason: str = "", **changes: Any) -> None:
        """End the attempt, and change other fields of the record."""
        last = replace(self.record.attempts[-1], state=state, ended=int(1000 * time.time()), reason=readable(reason))
        self.update(attempts=(*self.record.attempts[:-1], last), **changes)
