"""The needs of a recipe that a run does not meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.chain.stage_task import StageTask


def unmet_needs(recipe: str, tasks: Sequence[StageTask], device: str) -> list[str]:
    """One sentence for each need that the stages to train have and a run on this type of device does not meet."""
    trained = [task for task in tasks if task.imported is None]
    lacking = []
    if device == "cpu" and any("gpu" in task.stage.needs for task in trained):
        lacking.append(f"{recipe} is meant for a GPU, and PyTorch finds none here: on the CPU it takes very long")
    bare = [task for task in trained if "images" in task.stage.needs and task.stage.data.train is None]
    if bare:
        count = len(bare[0].train_photos.paths)
        lacking.append(
            f"{recipe} is meant for a data set, and none is given (--data; with make: DATA=): "
            f"it would train on the {count} packaged photographs"
        )
    return lacking
