"""The schema of a segment, and the parts that all schemas share."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
)

from pipeline.recipes.registered import OBJECTIVES
from pipeline.recipes.yaml_source import nearest, shown

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Count = Annotated[int, Field(ge=0)]
Problem = tuple[tuple[str | int, ...], str]
"""The path of a field, and what is wrong with it."""


class Settings(BaseModel):
    """Base class: frozen, without unknown keys or type conversions (`true` and `"3"` are not numbers)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _trainable(value: object) -> object:
    patterns = isinstance(value, tuple) and value and all(isinstance(item, str) for item in value)
    if patterns or value in ("all", "new"):
        return value
    hint = nearest(value, ["all", "new"])
    raise ValueError(f"should be 'all', 'new' or a list of name patterns, not {shown(value)}{hint}")


def registered(known: Mapping[str, object], what: str, name: str) -> str:
    """The name, if it is a known one; raises ValueError otherwise."""
    if name in known:
        return name
    hint = nearest(name, list(known)) or f"; expected one of {', '.join(known)}"
    raise ValueError(f"no {what} {shown(name)}{hint}")


class StepDecay(Settings):
    """Drops of the learning rates at given steps of a segment."""

    at: tuple[PositiveInt, ...] = Field(min_length=1)
    """Steps of the segment, in ascending order."""
    factor: Annotated[float, Field(gt=0, lt=1)]
    """The rates are multiplied by this factor at each of the steps."""


FORMS = MAPPING, WORD = "<mapping>", "<word>"
"""Names of the two forms that a field may have. Pydantic adds them to the field's path in its errors."""


def _decay_form(value: object) -> str:
    return MAPPING if isinstance(value, dict | StepDecay) else WORD


Decay = Annotated[
    Annotated[Literal["constant", "cosine"], Tag(WORD)] | Annotated[StepDecay, Tag(MAPPING)],
    Discriminator(_decay_form),
]


class Segment(Settings):
    """One part of a stage's schedule, with its own trainable parameters, objective and new optimizer."""

    name: Word
    train: Annotated[Literal["all", "new"] | tuple[str, ...], BeforeValidator(_trainable)]
    """`new`: parameters that were not copied from the parent, and all parameters of components that it lacks."""
    objective: Annotated[str, AfterValidator(partial(registered, OBJECTIVES, "objective"))]
    """`rate-distortion`, `align` (trains only the new components, on the inputs and outputs of the components they
    replace), or a registered objective of your own."""
    steps: Count
    handover: Count = 0
    """Steps over which a new component gradually replaces the parent's; at most `steps`."""
    lr: dict[str, PositiveFloat] = Field(min_length=1)
    """Learning rate by parameter group or name pattern."""
    decay: Decay = "constant"
    """`cosine`: the learning rate falls to zero at the last step. `{at: [500, 800], factor: 0.1}`: it drops twice."""
    warmup: Count = 0
    """Steps over which the learning rate rises linearly to its value."""


def decay_problems(decay: StepDecay, steps: int) -> list[Problem]:
    """What is wrong with the steps of a decay in a segment of `steps` steps."""
    if list(decay.at) != sorted(set(decay.at)):
        return [(("decay", "at"), f"the steps {shown(decay.at)} are not in ascending order")]
    if decay.at[-1] >= steps:
        return [(("decay", "at"), f"step {decay.at[-1]} is not before the end of the segment's {steps} steps")]
    return []
