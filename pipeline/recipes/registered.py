"""The names that a recipe may use for objectives and metrics; what they compute is registered in higher rooms."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveTraits:
    """Where an objective can be used."""

    needs_parent: bool = False
    """It compares with the parent, which a root stage does not have."""
    new_alone: bool = False
    """It trains new components by themselves: the segment must say `train: new`."""
    handover: bool = True
    """It runs the whole codec, so that a new component can take over gradually."""
    steady: bool = True
    """Its loss is of one size from step to step, so that a much larger one is worth a message."""


OBJECTIVES: dict[str, ObjectiveTraits] = {
    "rate-distortion": ObjectiveTraits(),
    "align": ObjectiveTraits(needs_parent=True, new_alone=True, handover=False, steady=False),
}
"""The traits of every objective by its name; `register_objective` in `pipeline.training.objectives` adds to them."""

METRICS: dict[str, int] = {"mse": 1, "ms-ssim": 161}
"""Pixels that each side of an image must have, by the name of the metric that a stage trains on.

MS-SSIM needs 161, for five scales of an 11-tap window. `register_metric` in `pipeline.evaluation.metrics` adds to them.
"""
