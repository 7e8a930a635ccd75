"""The options that select a chain on the command line."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.chain import Chain
from pipeline.chain.root_weights import root_weights
from pipeline.recipes.loading import load_recipe


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
        stages = recipe.chain(self.stage)
        baseline = self.baseline
        if not (baseline or self.start or self.scratch):
            baseline = root_weights(recipe, stages)
        return Chain(recipe.name, stages, self.runs, baseline, self.start, recipe.sources)
