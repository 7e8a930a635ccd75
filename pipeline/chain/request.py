"""What a command asks for: a chain, whose λ and metric may follow from the file of its root."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.chain.chain import Chain
from pipeline.chain.plan import ChainError
from pipeline.common.tables import shortest
from pipeline.recipes.loading import Recipe, load_recipe
from pipeline.recipes.schema import Stage
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.trained_for import LMBDAS, TrainedFor, trained_for


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
    name: str | None = None
    """What is added to the recipe's name in the results."""

    def chain(self) -> Chain:
        """Build the chain. Raises RecipeError, and ChainError if λ is neither known nor given."""
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ChainError(
                f"--name {self.name}: give letters, digits, `_`, `-` and `.`, which a folder's name may have"
            )
        recipe = load_recipe(self.recipe, self.overrides)
        decided, note, doubt = self._loss(recipe.chain(self.stage)[0])
        if decided:
            recipe = load_recipe(self.recipe, (*self.overrides, *decided))
        baseline = self.baseline
        if not (baseline or self.start or self.scratch):
            baseline = _root_weights(recipe, recipe.chain(self.stage)[0])
        if self.name:
            recipe = replace(recipe, name=f"{recipe.name}-{self.name}")
        chain = Chain(recipe, self.stage, self.runs, baseline, self.start)
        chain.note, chain.doubt = note, doubt
        return chain

    def _loss(self, root: Stage) -> tuple[tuple[str, ...], str, str]:
        """The settings of λ and metric that the root's file decides, a note about them, and a contradiction.

        A chain that continues with the codec of a file has the file's λ and metric, unless others are given. A root
        that is trained from a file's weights may have had another loss: only λ is taken from the file, if it is not
        given and the metric is the same.
        """
        file = self.baseline or self.start
        if file is None or (self.start and self._gives("lmbda")):
            return (), "", ""
        known = trained_for(file)
        if known is None or (self.start and known.metric != root.metric):
            self._check_given(file, root.metric)
            return (), "", ""
        if self.start:
            return (f"lmbda={known.lmbda}",), _shown(known), ""
        lmbda = root.lmbda if self._gives("lmbda") else known.lmbda
        metric = root.metric if self._gives("metric") else known.metric
        decided = f"lmbda={lmbda}", f"metric={metric}"
        if (lmbda, metric) == (known.lmbda, known.metric):
            return decided, _shown(known), ""
        return decided, "", f"{file.name} has {_shown(known)}, but this chain has λ = {shortest(lmbda)} for {metric}"

    def _gives(self, key: str) -> bool:
        return any(override.partition("=")[0].strip() == key for override in self.overrides)

    def _check_given(self, file: Path, metric: str) -> None:
        if not self._gives("lmbda"):
            official = "; ".join(f"{', '.join(map(shortest, lmbdas))} for {name}" for name, lmbdas in LMBDAS.items())
            raise ChainError(
                f"{file}: neither the file nor its name says for which λ of {metric} it was trained. Give it with "
                f"--lmbda (with make: LAMBDA=).\n  The official λ are {official}."
            )


def _shown(known: TrainedFor) -> str:
    return f"λ = {shortest(known.lmbda)} for {known.metric}, by {known.source}"


def _root_weights(recipe: Recipe, root: Stage) -> Path | None:
    """The file named by `weights` of the root stage; None without it, or if it was trained for another λ or metric.

    Raises CheckpointError if the file is not a checkpoint.
    """
    if root.weights is None:
        return None
    path = (recipe.folder / root.weights).resolve()
    known = trained_for(path)
    if known is None:
        raise CheckpointError(f"{path}: its metadata lack the λ or metric it was trained for; give it with --baseline")
    return path if (known.lmbda, known.metric) == (root.lmbda, root.metric) else None
