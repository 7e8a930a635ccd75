"""The λ and metric that a checkpoint was trained for. Official files contain neither, but their names may tell."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.weights.published import Lineage

LMBDAS: dict[str, tuple[float, ...]] = {
    "mse": (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483),
    "ms-ssim": (2.4, 4.58, 8.73, 16.64, 31.73, 60.5),
}
"""The λ of the published checkpoints, by metric. The two lists have none in common."""
SPELLINGS = {"mse": "mse", "ms-ssim": "ms[-_]?ssim"}


class TrainedFor(NamedTuple):
    """λ and metric of a codec's loss, and the source of this knowledge."""

    lmbda: float
    metric: str
    source: str


def trained_for(path: Path) -> TrainedFor | None:
    """λ and metric of a codec's file, by its lineage or by an official file's name; None if neither tells.

    Raises CheckpointError if the file is no checkpoint.
    """
    return _loss(Lineage.read(path), path.name)


def with_loss(lineage: Lineage, name: str) -> Lineage:
    """The lineage of a file of this name, with λ and metric if they can be told."""
    found = _loss(lineage, name)
    return replace(lineage, lmbda=found.lmbda, metric=found.metric) if found else lineage


def _loss(lineage: Lineage, name: str) -> TrainedFor | None:
    stage = stage_settings(lineage.stage)
    for lmbda, metric in ((lineage.lmbda, lineage.metric), (stage.get("lmbda"), stage.get("metric"))):
        if isinstance(lmbda, float) and isinstance(metric, str) and metric in SPELLINGS:
            return TrainedFor(lmbda, metric, f"the lineage of {name}")
    return by_name(lineage.imported_from or name)


def stage_settings(stage: str | None) -> dict[str, Any]:
    """The settings in a lineage's YAML; empty if they cannot be read, since a file may come from anyone."""
    try:
        settings = yaml.safe_load(stage or "")
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def by_name(name: str) -> TrainedFor | None:
    """The official λ in a file's name, such as `0.013.pth.tar`; None if it has none, or several."""
    numbers = {float(number) for number in re.findall(r"(?<![\d.])\d+\.\d+(?!\.?\d)", name)}
    metrics = [metric for metric, word in SPELLINGS.items() if re.search(rf"(?<![a-z]){word}(?![a-z])", name.lower())]
    found = [(lmbda, metric) for metric in metrics or LMBDAS for lmbda in LMBDAS[metric] if lmbda in numbers]
    return TrainedFor(*found[0], f"the name of {name}") if len(found) == 1 else None
