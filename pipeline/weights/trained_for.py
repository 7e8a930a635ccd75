"""The λ and metric that a checkpoint was trained for. Official files contain neither, but their names may tell."""

import re
from pathlib import Path
from typing import NamedTuple

import yaml

from pipeline.weights.published import Lineage

LMBDAS = {
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
    """λ and metric of a checkpoint, from its lineage or from the name of an official file; None if neither tells.

    Raises CheckpointError if the file is no checkpoint.
    """
    lineage = Lineage.read(path)
    try:
        stage = yaml.safe_load(lineage.stage or "")
    except yaml.YAMLError:  # A file may come from anyone.
        stage = None
    if isinstance(stage, dict) and isinstance(stage.get("lmbda"), float) and stage.get("metric") in SPELLINGS:
        return TrainedFor(stage["lmbda"], stage["metric"], f"the lineage of {path.name}")
    return by_name(lineage.imported_from or path.name)


def by_name(name: str) -> TrainedFor | None:
    """The official λ in a file's name, such as `0.013.pth.tar`; None if it has none, or several."""
    numbers = {float(number) for number in re.findall(r"(?<![\d.])\d+\.\d+(?!\.?\d)", name)}
    metrics = [metric for metric, word in SPELLINGS.items() if re.search(rf"(?<![a-z]){word}(?![a-z])", name.lower())]
    found = [(lmbda, metric) for metric in metrics or LMBDAS for lmbda in LMBDAS[metric] if lmbda in numbers]
    return TrainedFor(*found[0], f"the name of {name}") if len(found) == 1 else None
