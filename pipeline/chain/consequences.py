"""What a person must agree to before a chain runs."""

from collections.abc import Sequence

from pipeline.chain.plan import FORCED, PlannedStage
from pipeline.chain.stage_task import StageTask


def consequences(recipe: str, plan: Sequence[PlannedStage], restarted: Sequence[StageTask], device: str) -> list[str]:
    """One sentence for each need that is not met, each finished stage to rebuild and each training to restart.

    `restarted` are the stages whose interrupted trainings restart. `device` is the type of the device that trains.
    """
    todo = [planned for planned in plan if planned.status != "done"]
    resumed = bool(todo) and todo[0].progress is not None  # The question was asked when it began.
    return [
        *([] if resumed else _unmet_needs(recipe, [planned.task for planned in todo if planned.trains], device)),
        *(_replacement(planned) for planned in todo if planned.progress is None and planned.task.is_published),
        *(
            f"{task.stage.name}: the interrupted training moves to {task.chain_folder / 'abandoned'}"
            for task in restarted
        ),
    ]


def _replacement(planned: PlannedStage) -> str:
    """A sentence about a finished stage that is replaced."""
    moves = f"the published stage moves to {planned.task.chain_folder / 'superseded'}"
    if planned.reason == FORCED:
        return f"{planned.name}: {moves}"
    if planned.reason.startswith("waits for"):
        return f"{planned.name}: if {planned.task.stage.parent} changes, it is rebuilt, and {moves}"
    return f"{planned.name}: {planned.reason}{'; it is rebuilt' if planned.status == 'stale' else ''}, and {moves}"


def _unmet_needs(recipe: str, trained: Sequence[StageTask], device: str) -> list[str]:
    """One sentence for each need that the stages to train have and a run on this type of device does not meet."""
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
