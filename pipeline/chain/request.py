"""What a command asks for: a chain, and which of its stages to build again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.chain import Chain
from pipeline.chain.root_loss import RootLoss, loss_of_baseline, loss_of_start
from pipeline.recipes.loading import Recipe, load_recipe
from pipeline.recipes.schema import Stage
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.trained_for import trained_for


@dataclass(frozen=True)
class Rebuild:
    """Stages to rebuild on request, and the question that confirms it."""

    force: bool = False
    """Rebuild the chain's last stage even if it is current."""
    fresh: bool = False
    """Restart interrupted trainings from step 0."""
    confirm: Callable[[list[str]], None] = lambda consequences: None
    """Raises an error that stops the run if the person does not agree."""


@dataclass(frozen=True)
class ChainRequest:
    """A recipe with overrides, the target stage, and the source of the root."""

    recipe: str
    overrides: tuple[str, ...]
    stage: str
    runs: Path
    baseline: Path | None = None
    """A checkpoint that is used as the root."""
    start: Path | None = None
    """A checkpoint from whose weights the root is trained."""
    scratch: bool = False
    """Train the root even if the recipe has weights for it."""

    def chain(self) -> Chain:
        """Build the chain. Raises RecipeError and ChainError."""
        recipe = load_recipe(self.recipe, self.overrides)
        loss = self._loss(recipe.chain(self.stage)[0])
        if loss.overrides:
            recipe = load_recipe(self.recipe, (*self.overrides, *loss.overrides))
        stages = recipe.chain(self.stage)
        baseline = self.baseline
        if not (baseline or self.start or self.scratch):
            baseline = _root_weights(recipe, stages)
        chain = Chain(recipe.name, stages, self.runs, baseline, self.start, recipe.sources)
        chain.note, chain.doubt = loss.note, loss.doubt
        return chain

    def _loss(self, root: Stage) -> RootLoss:
        if self.baseline is not None:
            return loss_of_baseline(self.baseline, root, self.overrides)
        return loss_of_start(self.start, root, self.overrides) if self.start is not None else RootLoss()


def _root_weights(recipe: Recipe, stages: Sequence[Stage]) -> Path | None:
    """The file named by `weights` of the root stage; None without it, or if it was trained for another λ or metric.

    Raises CheckpointError if the file is not a checkpoint.
    """
    root = stages[0]
    if root.weights is None:
        return None
    path = (recipe.folder / root.weights).resolve()
    known = trained_for(path)
    if known is None:
        raise CheckpointError(f"{path}: its metadata lack the λ or metric it was trained for; give it with --baseline")
    return path if (known.lmbda, known.metric) == (root.lmbda, root.metric) else None
