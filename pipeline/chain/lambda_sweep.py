"""A sweep over λ and seeds, with chains for each pair. Every chain can be interrupted and resumed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.chain import Chain
from pipeline.chain.plan import ChainError, PlannedStage
from pipeline.chain.request import ChainRequest
from pipeline.common.tables import Table, shortest
from pipeline.recipes.loading import Recipe, load_recipe

LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)
"""The λ of the published checkpoints."""


@dataclass(frozen=True)
class Point:
    """One λ and seed of a sweep, with the chains to build for it: one per target stage."""

    title: str
    """`0.013`, or `0.013 seed 1`."""
    chains: list[Chain]

    def plan(self) -> dict[str, PlannedStage]:
        """The status of each stage, by name."""
        return {planned.name: planned for chain in self.chains for planned in chain.plan()}


@dataclass(frozen=True)
class Sweep:
    """A recipe with its overrides, the target stages, the λ, and the folder of runs."""

    recipe: str
    overrides: tuple[str, ...]
    targets: tuple[str, ...]
    """Empty for all stages without children."""
    lmbdas: tuple[float, ...]
    runs: Path
    baseline: Path | None = None
    """File from which the root is imported."""
    seeds: tuple[int, ...] = ()
    """Empty for the seeds of the recipe."""

    def points(self) -> Iterator[Point]:
        """Every λ and seed. Raises RecipeError and ChainError."""
        if self.baseline is not None and len(self.lmbdas) > 1:
            raise ChainError(
                f"{self.baseline}: a codec has one λ, but the sweep has {len(self.lmbdas)}; give its λ with --lmbda"
            )
        for lmbda in sorted(self.lmbdas):
            for seed in self.seeds or (None,):
                title = shortest(lmbda) + (f" seed {seed}" if seed is not None else "")
                overrides = [*self.overrides, f"lmbda={lmbda!r}", *([f"seed={seed}"] if seed is not None else [])]
                targets = self.targets or leaves(load_recipe(self.recipe, overrides))
                requests = (ChainRequest(self.recipe, tuple(overrides), t, self.runs, self.baseline) for t in targets)
                yield Point(title, [request.chain() for request in requests])

    def table(self) -> Table:
        """The status of all stages: one row per stage, one column per λ and seed, in the order of running."""
        columns = {point.title: point.plan() for point in self.points()}
        names = dict.fromkeys(name for planned in columns.values() for name in planned)
        table = Table(f"{Path(self.recipe).name}, λ by λ", ("stage", *columns))
        for name in names:
            table.add(name, *(_cell(planned[name]) for planned in columns.values()))
        left = [steps_left(list(planned.values())) for planned in columns.values()]
        table.add("steps left", *(f"{steps:,}" if steps else "–" for steps in left))
        return table


def leaves(recipe: Recipe) -> list[str]:
    """Names of the stages without children."""
    parents = {stage.parent for stage in recipe.stages.values()}
    return [name for name in recipe.stages if name not in parents]


def _cell(planned: PlannedStage) -> str:
    """`done`, `–`, `stale`, or the segment and step of an interruption."""
    if planned.status == "interrupted":
        return planned.reason.removeprefix("interrupted in ").replace(" at step ", " ")
    return "–" if planned.status == "missing" else planned.status


def steps_left(plan: Iterable[PlannedStage]) -> int:
    """Steps of the stages in a plan that are neither saved nor published."""
    left = 0
    for planned in plan:
        if planned.trains:
            left += sum(segment.steps for segment in planned.task.stage.schedule)
            left -= planned.progress.stage_step if planned.progress else 0
    return left
