"""Names of the objectives and metrics that a recipe may use. Higher rooms register their implementations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveTraits:
    """Where an objective can be used."""

    needs_parent: bool = False
    """The objective compares with the parent, so a root stage cannot use it."""
    new_alone: bool = False
    """The objective trains new components alone, so the segment must have `train: new`."""
    handover: bool = True
    """The objective runs the whole codec, so a new component can take over gradually."""
    steady: bool = True
    """The loss stays at a similar size from step to step, so a much larger loss is reported."""


OBJECTIVES: dict[str, ObjectiveTraits] = {
    "rate-distortion": ObjectiveTraits(),
    "align": ObjectiveTraits(needs_parent=True, new_alone=True, handover=False, steady=False),
}
"""Traits of each objective by name; `register_objective` in `pipeline.training.objectives` adds to them."""

METRICS: dict[str, int] = {"mse": 1, "ms-ssim": 161}
"""Minimum side of an image in pixels for each metric that a stage can train on.

MS-SSIM needs 161 for its five scales with an 11-tap window. `register_metric` in `pipeline.evaluation.metrics` adds
other metrics.
"""
