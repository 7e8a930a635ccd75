"""What a person must agree to before a chain runs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.chain.chain import Chain
from pipeline.chain.plan import PlannedStage
from pipeline.chain.stage_task import StageTask


def consequences(
    chain: Chain, plan: Sequence[PlannedStage], forced: StageTask | None, restarted: Sequence[StageTask], device: str
) -> list[str]:
    """One sentence for each need that is not met, each finished stage to rebuild and each training to restart.

    `forced` is the finished stage to rebuild on request. `restarted` are the interrupted trainings to restart. `device`
    is the type of the device that trains.
    """
    superseded, abandoned = chain.folder / "superseded", chain.folder / "abandoned"
    todo = [planned for planned in plan if planned.status != "done" or planned.task is forced]
    resumed = bool(todo) and todo[0].progress is not None  # The question was asked when it began.
    return [
        *_unmet_needs(chain.recipe, [] if resumed else [planned.task for planned in todo], device),
        *(
            f"{planned.name}: {_why(planned)}the published stage moves to {superseded}"
            for planned in todo
            if planned.progress is None and (planned.status == "stale" or planned.task is forced)
        ),
        *(f"{task.stage.name}: the interrupted training moves to {abandoned}" for task in restarted),
    ]


def _why(planned: PlannedStage) -> str:
    """Why a finished stage is rebuilt; empty if that was requested."""
    if planned.status != "stale":
        return ""
    if planned.reason.startswith("waits for"):
        return f"if {planned.task.stage.parent} changes, it is rebuilt, and "
    return f"{planned.reason}; it is rebuilt, and "


def _unmet_needs(recipe: str, tasks: Sequence[StageTask], device: str) -> list[str]:
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
