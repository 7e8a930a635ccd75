"""A sweep over λ and seeds, with chains for each pair. Every chain can be interrupted and resumed."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.chain.chain import Chain
from pipeline.chain.plan import PlannedStage
from pipeline.common.tables import Table
from pipeline.recipes.loading import Recipe

Points = Mapping[str, list[Chain]]
"""The chains for each λ and seed, one per target stage. The titles are such as `0.013` and `0.013 seed 1`."""


def plan_of(chains: Iterable[Chain]) -> dict[str, PlannedStage]:
    """The status of each stage of some chains, by name."""
    return {planned.name: planned for chain in chains for planned in chain.plan()}


def sweep_table(recipe: str, points: Points) -> Table:
    """The status of all stages: one row per stage, one column per λ and seed, in the order of running."""
    columns = {title: plan_of(chains) for title, chains in points.items()}
    table = Table(f"{Path(recipe).name}, λ by λ", ("stage", *columns))
    for name in dict.fromkeys(name for planned in columns.values() for name in planned):
        table.add(name, *(_cell(planned[name]) for planned in columns.values()))
    left = [steps_left(planned.values()) for planned in columns.values()]
    table.add("steps left", *(f"{steps:,}" if steps else "–" for steps in left))
    return table


def leaves(recipe: Recipe) -> list[str]:
    """Names of the stages without children."""
    parents = {stage.parent for stage in recipe.stages.values()}
    return [name for name in recipe.stages if name not in parents]


def _cell(planned: PlannedStage) -> str:
    """`done`, `–`, `stale`, or the segment and step of an interruption. A remark on a stage's images is shortened."""
    if planned.status == "interrupted":
        return planned.reason.removeprefix("interrupted in ").replace(" at step ", " ")
    remark = " (other images)" if planned.reason.startswith("current;") else ""
    return "–" if planned.status == "missing" else planned.status + remark


def steps_left(plan: Iterable[PlannedStage]) -> int:
    """Steps of the stages in a plan that are neither saved nor published."""
    left = 0
    for planned in plan:
        if planned.trains:
            left += sum(segment.steps for segment in planned.task.stage.schedule)
            left -= planned.progress.stage_step if planned.progress else 0
    return left
