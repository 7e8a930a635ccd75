"""What a stage may say: frozen, typed fields, with units and ranges."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.recipes.registered import METRICS, OBJECTIVES
from pipeline.recipes.yaml_source import nearest, shown

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Count = Annotated[int, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Problem = tuple[tuple[str | int, ...], str]

PLACEHOLDER = re.compile(r"\{([A-Za-z]\w*)\}", re.ASCII)
"""What stands for one dotted component in a rename rule."""

# Where the images lie does not matter, which they are does: Photos.digest in pipeline/data/images.py says that.
# The rest decides how a stage is watched and judged, or how fast it runs, not which weights come out.
WITHOUT_INFLUENCE: dict[str, Any] = {
    "data": {"train", "val", "workers"},
    "log_every": True,
    "checkpoint_every": True,
    "gradient_checkpointing": True,
    "evaluation": True,
    "accept": True,
    "weights": True,
}


class Settings(BaseModel):
    """Common ground: frozen, no unknown keys, no conversions (`true` is no number, `"3"` neither)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelChoice(Settings):
    """The codec: a preset's sizes, a phase's components, and any field of the codec set otherwise."""

    preset: str
    phase: int = Field(ge=0, le=4)
    overrides: dict[str, Any] = {}
    """What differs from the preset at that phase; the codec checks it when it is built. A size such as `M`, a slot's
    kind and settings (`attn_s3: {kind: rwkv, hidden_rate: 1}`), or settings of a kind wherever it is used
    (`prior: {rwkv: {mix_rate: 0.25}}`)."""


class Data(Settings):
    """Images and how a batch is cut from them."""

    train: str | None = None
    """Folder of training images, relative to the working directory; null for the packaged photographs."""
    val: str | None = None
    """The same for validation, on whole images."""
    crop: PositiveInt
    """Side of the square training crops, in pixels."""
    batch_size: PositiveInt
    """Crops a step, all processes together."""
    workers: Count = 0
    """Reading processes a training process; 0 reads in the training process itself."""


class Optimizer(Settings):
    """Adam and what guards its steps."""

    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient over all trainable parameters."""
    max_bad_steps: PositiveInt = 10
    """Steps with a non-finite loss or gradient, one after another, before the run stops."""


class EvaluationSettings(Settings):
    """What is measured on the validation images."""

    images: PositiveInt | None = None
    """At most that many images; null for all."""
    reconstructions: Count = 4
    """How many of them are kept beside their originals."""


def _renaming(rules: dict[str, str]) -> dict[str, str]:
    for old, new in rules.items():
        names, targets = PLACEHOLDER.findall(old), PLACEHOLDER.findall(new)
        problem = ""
        if set("{}") & set(PLACEHOLDER.sub("", old + new)):
            problem = "a placeholder is a word in braces, such as {i}"
        elif len(names) > len(set(names)):
            problem = "a placeholder stands once on the left"
        elif unknown := sorted(set(targets) - set(names)):
            problem = f"{{{unknown[0]}}} is not on the left"
        if problem:
            raise ValueError(f"{old!r} → {new!r}: {problem}")
    return rules


class Transfer(Settings):
    """How a child starts from its parent."""

    initialization: Literal["function-preserving", "design", "scratch"] = "function-preserving"
    """`function-preserving`: as near to the parent's output as the new form allows; `design`: random; `scratch`: all
    of the child is random and nothing is copied, to compare a migration with training anew."""
    rename: Annotated[dict[str, str], AfterValidator(_renaming)] = {}
    """Module prefix in the parent → prefix in the child, beside what the child's components take over by themselves;
    `{i}` stands for one part of a dotted name."""
    narrow: bool = True
    """Where the child differs in a smaller inner width alone, keep the parent's most useful inner channels and solve
    the layer that reads them; needs `function-preserving`."""
    fit: bool = False
    """Solve the last linear layer of each new component for the output of the one it replaces; likewise."""
    calibration: PositiveInt = 24
    """Training crops that `narrow` and `fit` compute with."""


def _trainable(value: object) -> object:
    patterns = isinstance(value, tuple) and value and all(isinstance(item, str) for item in value)
    if patterns or value in ("all", "new"):
        return value
    hint = nearest(value, ["all", "new"])
    raise ValueError(f"should be 'all', 'new' or a list of name patterns, not {shown(value)}{hint}")


def _objective(name: str) -> str:
    return _registered(name, OBJECTIVES, "objective")


def _metric(name: str) -> str:
    return _registered(name, METRICS, "metric")


def _registered(name: str, known: Mapping[str, object], what: str) -> str:
    if name in known:
        return name
    hint = nearest(name, list(known)) or f"; there are {', '.join(known)}"
    raise ValueError(f"no {what} {shown(name)}{hint}")


class Segment(Settings):
    """One part of a stage's schedule, with its own trainable parameters, objective and fresh optimizer."""

    name: Word
    train: Annotated[Literal["all", "new"] | tuple[str, ...], BeforeValidator(_trainable)]
    """`new`: what was not copied from the parent, and all of a component that the parent does not have."""
    objective: Annotated[str, AfterValidator(_objective)]
    """`rate-distortion`, `align` (the new components alone, on their inputs and outputs in the parent), or a registered
    objective of your own."""
    steps: Count
    handover: Count = 0
    """Steps over which a new component takes over from the parent's; within `steps`."""
    lr: dict[str, PositiveFloat] = Field(min_length=1)
    """Learning rate by parameter group or name pattern."""
    decay: Literal["constant", "cosine"] = "constant"
    """`cosine`: from the learning rate down to zero at the last step."""
    warmup: Count = 0
    """Steps of linear rise to the learning rate."""


class Accept(Settings):
    """Limits against the parent on the validation images; null is not checked."""

    bpp_change: float | None = None
    """Largest relative change of bits per pixel; 0.01 allows one per cent more."""
    psnr_drop: float | None = None
    """Largest loss of PSNR, in dB."""
    rd_loss_change: float | None = None
    """Largest relative change of the rate–distortion loss."""


class Stage(Settings):
    """One stage of a migration, complete: all that decides what `parent` is turned into."""

    name: Word
    parent: Word | None
    """Stage whose checkpoint is taken up; null starts from random weights."""
    model: ModelChoice
    lmbda: PositiveFloat
    """λ of λ·255²·MSE + bpp, or of λ·(1 − MS-SSIM) + bpp."""
    metric: Annotated[str, AfterValidator(_metric)] = "mse"
    """`mse`, `ms-ssim`, or a registered metric of your own that can be trained on."""
    data: Data
    optimizer: Optimizer = Optimizer()
    precision: Literal["no", "bf16"] = "no"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, such as 0.999; each segment ends with the average. null: none."""
    gradient_checkpointing: bool = False
    """Recompute the RWKV components' activations in the backward pass: less memory, more time."""
    compile: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    log_every: PositiveInt = 10
    """Steps."""
    checkpoint_every: PositiveInt = 500
    """Steps."""
    evaluation: EvaluationSettings = EvaluationSettings()
    transfer: Transfer = Transfer()
    weights: str | None = None
    """Trained weights that a first stage is taken from, relative to the recipe's folder; used where λ and metric are
    those that they were trained for. null: the schedule trains it."""
    schedule: tuple[Segment, ...]
    accept: Accept = Accept()

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        problems = _schedule_problems(self)
        if self.data.crop < METRICS[self.metric]:
            least = f"'metric: {self.metric}' needs at least {METRICS[self.metric]} pixels a side, such as 256"
            problems.append((("data", "crop"), f"{self.data.crop} is too small: {least}"))
        if self.parent is None and self.transfer != Transfer():
            problems.append((("transfer",), "a stage without a parent has nothing to transfer"))
        if self.parent is not None and self.weights is not None:
            problems.append((("weights",), "a stage with a parent starts from the parent's weights"))
        if problems:
            raise PydanticCustomError("misfit", "the stage does not fit together", {"problems": problems})
        return self

    def digest(self) -> str:
        """SHA-256 of what influences the trained weights, as hexadecimal.

        Left out are the intervals of logging and saving, evaluation and acceptance, gradient checkpointing,
        data workers and the paths (not the contents: their digest is that of the images) of the data.
        """
        fields = self.model_dump(mode="json", exclude=WITHOUT_INFLUENCE)
        for segment in fields["schedule"]:
            segment["lr"] = list(segment["lr"].items())  # The first that selects a parameter has it.
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The stage with every default written out; reads back as the same stage."""
        fields = self.model_dump(mode="json")
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)


def _schedule_problems(stage: Stage) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    for index, segment in enumerate(stage.schedule):
        at = ("schedule", index)
        if segment.name in seen:
            problems.append(((*at, "name"), f"a second segment named '{segment.name}'"))
        seen.add(segment.name)
        for key, length in (("handover", segment.handover), ("warmup", segment.warmup)):
            if length > segment.steps:
                problems.append(((*at, key), f"{length} steps are more than the segment's {segment.steps}"))
        traits = OBJECTIVES[segment.objective]
        if segment.handover and (stage.parent is None or not traits.handover):
            problems.append(((*at, "handover"), "needs a parent and an objective that runs the whole codec"))
        if traits.needs_parent and stage.parent is None:
            problems.append(((*at, "objective"), f"'{segment.objective}' needs a parent"))
        if traits.new_alone and segment.train != "new":
            problems.append(((*at, "objective"), f"'{segment.objective}' needs 'train: new'"))
    return problems
