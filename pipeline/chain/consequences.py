"""What a person must agree to before a chain runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.chain.needs import unmet_needs

if TYPE_CHECKING:
    from pipeline.chain.chain import Chain, PlannedStage
    from pipeline.chain.stage_task import StageTask


def consequences(
    chain: Chain,
    plan: Sequence[PlannedStage],
    published: Sequence[StageTask],
    begun: Sequence[StageTask],
    device: str,
) -> list[str]:
    """One sentence for each need that is not met, each finished stage to rebuild and each training to restart.

    `published` are the finished stages to rebuild on request. `begun` are the interrupted trainings to restart.
    `device` is the type of the device that trains.
    """
    superseded, abandoned = chain.folder / "superseded", chain.folder / "abandoned"
    todo = [planned for planned in plan if planned.status != "done" or planned.task in published]
    resumed = bool(todo) and todo[0].status in ("cut off", "refused")  # The question was asked when it began.
    return [
        *unmet_needs(chain.recipe, [] if resumed else [planned.task for planned in todo], device),
        *(
            f"{planned.name}: {_why(planned)}the published stage moves to {superseded}"
            for planned in todo
            if planned.status == "stale" or planned.task in published
        ),
        *(f"{task.stage.name}: the interrupted training moves to {abandoned}" for task in begun),
    ]


def _why(planned: PlannedStage) -> str:
    """Why a finished stage is rebuilt; empty if that was requested."""
    if planned.status != "stale":
        return ""
    if planned.reason.startswith("waits for"):
        return f"if {planned.task.stage.parent} changes, it is rebuilt, and "
    return f"{planned.reason}; it is rebuilt, and "
