"""How many steps of a chain are done and saved."""

from collections.abc import Iterable

from pipeline.chain.chain import PlannedStage
from pipeline.chain.stage_task import StageTask


def steps_done(plan: Iterable[PlannedStage]) -> tuple[int, int]:
    """Steps that are saved or published, and all steps of the stages in a plan."""
    done = total = 0
    for planned in plan:
        count = steps_in(planned.task)
        total += count
        if planned.status == "done":
            done += count
        elif (progress := planned.progress) is not None:
            done += progress.stage_step
    return done, total


def steps_in(task: StageTask) -> int:
    """Steps of a stage's schedule; 0 for a root that is imported."""
    return 0 if task.imported else sum(segment.steps for segment in task.stage.schedule)
