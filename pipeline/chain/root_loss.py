"""λ and metric of a chain, which may follow from the file of its root."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.plan import ChainError
from pipeline.common.packaged import WEIGHTS
from pipeline.common.tables import shortest
from pipeline.recipes.loading import Recipe
from pipeline.recipes.schema import Stage
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.trained_for import LMBDAS, trained_for


@dataclass(frozen=True)
class RootLoss:
    """What the file of a root says about λ and metric."""

    overrides: tuple[str, ...] = ()
    """The settings that it decides."""
    note: str = ""
    doubt: str = ""
    """A contradiction to the settings that were given."""


def root_loss(root: Stage, file: Path, start: bool, overrides: Sequence[str]) -> RootLoss:
    """What follows from the file of a root. Raises ChainError if λ is neither known nor given.

    A chain that continues with the codec of a file has the file's λ and metric, unless others are given. A root that is
    trained from a file's weights (`start`) may have had another loss: only λ is taken from the file, if it is not given
    and the metric is the same.
    """
    given = {override.partition("=")[0].strip() for override in overrides}
    if start and "lmbda" in given:
        return RootLoss()
    known = trained_for(file)
    if known is None or (start and known.metric != root.metric):
        if "lmbda" in given:
            return RootLoss()
        official = "; ".join(f"{', '.join(map(shortest, lmbdas))} for {name}" for name, lmbdas in LMBDAS.items())
        raise ChainError(
            f"{file}: neither the file nor its name says for which λ of {root.metric} it was trained. Give it with "
            f"--lmbda (with make: LAMBDA=).\n  The official λ are {official}."
        )
    shown = f"λ = {shortest(known.lmbda)} for {known.metric}, by {known.source}"
    if start:
        return RootLoss((f"lmbda={known.lmbda}",), shown)
    lmbda = root.lmbda if "lmbda" in given else known.lmbda
    metric = root.metric if "metric" in given else known.metric
    decided = f"lmbda={lmbda}", f"metric={metric}"
    if (lmbda, metric) == (known.lmbda, known.metric):
        return RootLoss(decided, shown)
    doubt = f"{file.name} has {shown}, but this chain has λ = {shortest(lmbda)} for {metric}"
    return RootLoss(decided, doubt=doubt)


def root_weights(recipe: Recipe, root: Stage) -> Path | None:
    """The file named by `weights` of the root stage; None without it, or if it was trained for another λ or metric.

    Raises ChainError if there is no such file, CheckpointError if it is not a checkpoint.
    """
    if root.weights is None:
        return None
    bundled = {path.stem: path for path in WEIGHTS.glob("*.safetensors")}
    path = bundled.get(root.weights) or (recipe.folder / root.weights).resolve()
    if not path.exists():
        raise ChainError(
            f"{recipe.sources[root.name].origin_of(['weights'])}: weights: there is no {path}; give a file relative to "
            f"the recipe's folder, a bundled codec ({', '.join(sorted(bundled))}), or null"
        )
    known = trained_for(path)
    if known is None:
        raise CheckpointError(f"{path}: its metadata lack the λ or metric it was trained for; give it with --baseline")
    return path if (known.lmbda, known.metric) == (root.lmbda, root.metric) else None
