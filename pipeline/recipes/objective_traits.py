"""What a recipe may ask of each objective; `pipeline.training.objectives` holds what they compute."""

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
"""The traits of every objective by its name in recipes; `register_objective` adds to them."""
