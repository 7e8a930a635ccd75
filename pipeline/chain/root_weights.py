"""The trained weights that a recipe offers for its first stage."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.recipes.loading import Recipe
from pipeline.recipes.schema import Stage
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.published import Lineage


def root_weights(recipe: Recipe, stages: Sequence[Stage]) -> Path | None:
    """The file that `weights` of the first stage names; None where there is none, or only one of another λ or loss.

    Raises CheckpointError for a file that is no checkpoint.
    """
    root = stages[0]
    if root.weights is None:
        return None
    path = (recipe.folder / root.weights).resolve()
    trained = yaml.safe_load(Lineage.read(path).stage or "") or {}
    if not {"lmbda", "metric"} <= trained.keys():
        raise CheckpointError(f"{path}: does not say which loss it was trained for; give it as --baseline instead")
    return path if (trained["lmbda"], trained["metric"]) == (root.lmbda, root.metric) else None
