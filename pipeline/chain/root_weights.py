"""The trained weights that a recipe provides for its root stage."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.recipes.loading import Recipe
from pipeline.recipes.schema import Stage
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.published import Lineage


def root_weights(recipe: Recipe, stages: Sequence[Stage]) -> Path | None:
    """The file named by `weights` of the root stage; None without it, or if it was trained for another λ or metric.

    Raises CheckpointError if the file is not a checkpoint.
    """
    root = stages[0]
    if root.weights is None:
        return None
    path = (recipe.folder / root.weights).resolve()
    trained = yaml.safe_load(Lineage.read(path).stage or "") or {}
    if not {"lmbda", "metric"} <= trained.keys():
        raise CheckpointError(f"{path}: its metadata lack the λ or metric it was trained for; give it with --baseline")
    return path if (trained["lmbda"], trained["metric"]) == (root.lmbda, root.metric) else None
