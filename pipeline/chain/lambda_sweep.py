"""A sweep over λ: one chain per λ. Each can be interrupted and resumed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.chain import Chain, ChainError, PlannedStage
from pipeline.chain.root_weights import root_weights
from pipeline.common.tables import Table, shortest
from pipeline.recipes.loading import Recipe, load_recipe

LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)
"""The λ of the published checkpoints."""


@dataclass(frozen=True)
class StartingPoint:
    """The λ whose trained root initializes the roots of the other λ, and their settings, such as fewer steps."""

    lmbda: float
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """A recipe with its overrides, the target stages, the λ, and the folder of runs."""

    recipe: str
    overrides: tuple[str, ...]
    targets: tuple[str, ...]
    """Empty for all stages without children."""
    lmbdas: tuple[float, ...]
    runs: Path
    starting_point: StartingPoint | None = None
    baseline: Path | None = None
    """File from which the roots are imported. With a starting point, only that λ's root is imported."""

    def chains(self) -> Iterator[tuple[float, list[Chain]]]:
        """Every λ with its chains, the starting point first. Raises RecipeError and ChainError."""
        first = self.starting_point.lmbda if self.starting_point else None
        if self.baseline is not None and first is None and len(self.lmbdas) > 1:
            raise ChainError(
                f"{self.baseline}: a codec has one λ, but the sweep has {len(self.lmbdas)}; start the others from its "
                "weights with --from, or give only its λ with --lmbda"
            )
        if first is not None and first not in self.lmbdas:
            raise ChainError(f"λ = {shortest(first)} of --from is not in the sweep; add it to --lmbda")
        for lmbda in sorted(self.lmbdas, key=lambda lmbda: (lmbda != first, lmbda)):
            yield lmbda, self._chains(lmbda)

    def _chains(self, lmbda: float) -> list[Chain]:
        baseline, start = self.baseline, None
        settings: tuple[str, ...] = ()
        if self.starting_point is not None and lmbda != self.starting_point.lmbda:
            root = self._chains(self.starting_point.lmbda)[0].tasks[0]
            baseline, start, settings = None, root.checkpoint, self.starting_point.settings
        recipe = load_recipe(self.recipe, [*self.overrides, f"lmbda={lmbda!r}", *settings])
        targets = self.targets or leaves(recipe)
        lines = [recipe.chain(target) for target in targets]
        if baseline is None and start is None:
            baseline = root_weights(recipe, lines[0])
        return [Chain(recipe.name, stages, self.runs, baseline, start) for stages in lines]

    def table(self) -> Table:
        """The status of all stages: one row per stage, one column per λ, in the order of running."""
        columns = {
            lmbda: {p.name: p for chain in chains for p in self._plan_of(chain)} for lmbda, chains in self.chains()
        }
        names = dict.fromkeys(name for planned in columns.values() for name in planned)
        table = Table(f"{Path(self.recipe).name}, λ by λ", ("stage", *(shortest(lmbda) for lmbda in columns)))
        for name in names:
            table.add(name, *(_cell(planned[name]) for planned in columns.values()))
        left = [[p.task.stage for p in planned.values() if p.status != "done"] for planned in columns.values()]
        steps = [sum(segment.steps for stage in stages for segment in stage.schedule) for stages in left]
        table.add("steps left", *(f"{count:,}" if count else "–" for count in steps))
        return table

    def _plan_of(self, chain: Chain) -> list[PlannedStage]:
        """The chain's plan. While its starting point is not trained, all stages are missing."""
        root = chain.tasks[0]
        if root.start is not None and not root.start.is_file():
            return [PlannedStage(task, "missing", "waits for its start") for task in chain.tasks]
        return chain.plan()


def leaves(recipe: Recipe) -> list[str]:
    """Names of the stages without children."""
    parents = {stage.parent for stage in recipe.stages.values()}
    return [name for name in recipe.stages if name not in parents]


def _cell(planned: PlannedStage) -> str:
    """`done`, `–`, `stale`, or the segment and step of an interruption."""
    if planned.status == "cut off":
        return planned.reason.removeprefix("cut off in ").replace(" at step ", " ")
    return "–" if planned.status == "missing" else planned.status
