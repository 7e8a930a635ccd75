"""A sweep over λ: a chain for each, any of them cut off and continued like single ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.chain import Chain, ChainError, PlannedStage
from pipeline.chain.root_weights import root_weights
from pipeline.common.tables import Table, shortest
from pipeline.recipes.loading import Recipe, load_recipe

LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)
"""Those of the published checkpoints."""


@dataclass(frozen=True)
class StartingPoint:
    """The λ whose trained root the other λ's roots start from, and their settings: fewer steps, as a rule."""

    lmbda: float
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """What to run: a recipe with its overrides, the stages to reach, the λ, and where."""

    recipe: str
    overrides: tuple[str, ...]
    targets: tuple[str, ...]
    """Empty for all that no other grows from."""
    lmbdas: tuple[float, ...]
    runs: Path
    starting_point: StartingPoint | None = None
    baseline: Path | None = None
    """File that the roots are taken from; with a starting_point, its root alone."""

    def chains(self) -> Iterator[tuple[float, list[Chain]]]:
        """Every λ with its chains, the starting_point first; raises RecipeError and ChainError."""
        first = self.starting_point.lmbda if self.starting_point else None
        if self.baseline is not None and first is None and len(self.lmbdas) > 1:
            raise ChainError(
                f"{self.baseline}: a codec is of one λ, and here are {len(self.lmbdas)}; let the others start from its "
                "weights with --from, or give its --lmbda alone"
            )
        if first is not None and first not in self.lmbdas:
            raise ChainError(
                f"λ = {shortest(first)}, which the others are to start from, is not among those of the sweep"
            )
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
        """What is done and what is left: a row for each stage, a column for each λ in the order of running."""
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
        """The chain's plan; of one whose start is still to be trained, that everything is missing."""
        root = chain.tasks[0]
        if root.start is not None and not root.start.is_file():
            return [PlannedStage(task, "missing", "waits for its start") for task in chain.tasks]
        return chain.plan()


def leaves(recipe: Recipe) -> list[str]:
    """The stages that no other grows from."""
    parents = {stage.parent for stage in recipe.stages.values()}
    return [name for name in recipe.stages if name not in parents]


def _cell(planned: PlannedStage) -> str:
    """`done`, `–`, `stale`, or where it was cut off."""
    if planned.status == "cut off":
        return planned.reason.removeprefix("cut off in ").replace(" at step ", " ")
    return "–" if planned.status == "missing" else planned.status
