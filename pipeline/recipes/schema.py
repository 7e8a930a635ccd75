"""The schema of a stage: frozen, typed fields with units and ranges."""

import hashlib
import json
import re
from functools import partial
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from pipeline.recipes.registered import METRICS, OBJECTIVES
from pipeline.recipes.segment import Count, Problem, Segment, Settings, StepDecay, Word, decay_problems, registered

__all__ = ["Segment", "Stage", "StepDecay"]


def _named(folder: str) -> str:
    if not folder:  # Such as of an unset variable in `--data "$DATA"`.
        raise PydanticCustomError("folder", "should be a folder, or null for the packaged photographs")
    return folder


Folder = Annotated[str, AfterValidator(_named)]
Momentum = Annotated[float, Field(ge=0, lt=1)]

PLACEHOLDER = re.compile(r"\{([A-Za-z]\w*)\}", re.ASCII)
"""A placeholder in a rename rule; it matches one part of a dotted name."""

# The paths of the images do not matter; their contents do, and Photos.digest in pipeline/data/images.py covers those.
# The other fields affect logging, evaluation and speed, not the trained weights.
WITHOUT_INFLUENCE: dict[str, Any] = {
    "data": {"train", "val", "workers", "accumulate"},
    "log_every": True,
    "checkpoint_every": True,
    "gradient_checkpointing": True,
    "cuda_graph": True,
    "evaluation": True,
    "accept": True,
    "weights": True,
    "needs": True,
}


class ModelChoice(Settings):
    """The codec: the sizes of a preset, the components of a phase, and overrides of single fields."""

    preset: str
    phase: int = Field(ge=0, le=4)
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Differences from the preset at that phase; the codec checks them when it is built. A key is a size such as `M`,
    a slot with its kind and settings (`attn_s3: {kind: rwkv, hidden_rate: 1}`), or settings of a kind in every slot
    that uses it (`prior: {rwkv: {mix_rate: 0.25}}`)."""


class Data(Settings):
    """The images, and the size of the batches that are cut from them."""

    train: Folder | None = None
    """Folder of training images, relative to the working directory; null for the packaged photographs."""
    val: Folder | None = None
    """Folder of validation images, likewise; they are evaluated whole."""
    crop: PositiveInt
    """Side of the square training crops, in pixels."""
    batch_size: PositiveInt
    """Crops per step, over all processes."""
    accumulate: PositiveInt = 1
    """Micro-batches per step. Each process computes its crops in this many parts, one after another, to save memory.
    The result is that of the whole batch, up to rounding."""
    workers: int = Field(default=0, ge=0, le=256)
    """Data workers per training process; with 0, the training process reads the images itself."""


class Optimizer(Settings):
    """Settings of AdamW and limits on its steps."""

    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of convolution kernels and matrices. Biases and other vectors do not decay."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient over all trainable parameters."""
    max_bad_steps: PositiveInt = 10
    """Number of consecutive steps with a non-finite loss or gradient at which the run stops."""


class EvaluationSettings(Settings):
    """How the validation images are evaluated."""

    images: PositiveInt | None = None
    """Maximum number of images; null for all."""
    reconstructions: Count = 4
    """Number of reconstructions that are saved beside their originals."""


def _renaming(rules: dict[str, str]) -> dict[str, str]:
    for old, new in rules.items():
        names, targets = PLACEHOLDER.findall(old), PLACEHOLDER.findall(new)
        problem = ""
        if set("{}") & set(PLACEHOLDER.sub("", old + new)):
            problem = "a placeholder is a word in braces, such as {i}"
        elif len(names) > len(set(names)):
            problem = "a placeholder may occur only once on the left"
        elif unknown := sorted(set(targets) - set(names)):
            problem = f"{{{unknown[0]}}} is not on the left"
        if problem:
            raise ValueError(f"{old!r} → {new!r}: {problem}")
    return rules


class Transfer(Settings):
    """How a child starts from its parent."""

    initialization: Literal["function-preserving", "design", "scratch"] = "function-preserving"
    """`function-preserving`: new components start as near to the parent's output as their form allows. `design`: new
    components start random. `scratch`: nothing is copied, which compares a migration with training from scratch."""
    rename: Annotated[dict[str, str], AfterValidator(_renaming)] = Field(default_factory=dict)
    """Module prefix in the parent → prefix in the child, in addition to what the child's components copy by themselves.
    `{i}` matches one part of a dotted name."""
    narrow: bool = True
    """If a component differs only by a smaller inner width, keep the parent's most useful inner channels and solve the
    layer that reads them. Needs `function-preserving`."""
    fit: bool = False
    """Solve the last linear layer of each new component to match the component it replaces. Needs
    `function-preserving`."""
    calibration: PositiveInt = 24
    """Number of training crops that `narrow` and `fit` use."""


class Accept(Settings):
    """Limits relative to the parent on the validation images; null means no check."""

    bpp_change: float | None = None
    """Largest relative increase of bits per pixel; 0.01 allows one percent."""
    psnr_drop: float | None = None
    """Largest drop of PSNR, in dB."""
    rd_loss_change: float | None = None
    """Largest relative increase of the rate–distortion loss."""


class Stage(Settings):
    """One complete stage of a migration, from `parent` to a new checkpoint."""

    name: Word
    parent: Word | None
    """Stage whose checkpoint this stage starts from; null starts from random weights or from `weights`."""
    model: ModelChoice
    lmbda: PositiveFloat
    """λ of λ·255²·MSE + bpp, or of λ·(1 − MS-SSIM) + bpp."""
    metric: Annotated[str, AfterValidator(partial(registered, METRICS, "metric"))] = "mse"
    """`mse`, `ms-ssim`, or a registered metric of your own that can be trained on."""
    data: Data
    optimizer: Optimizer = Optimizer()
    precision: Literal["no", "bf16"] = "no"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, such as 0.999; each segment ends with the average. null: no average."""
    gradient_checkpointing: bool = False
    """Recompute the RWKV components' activations in the backward pass, to save memory at the cost of time."""
    compile: bool = False
    cuda_graph: bool = False
    """Replay the forward and backward passes as a CUDA graph, which saves the launch time of each kernel. It has an
    effect only on a GPU, for `mse`, without `compile`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    log_every: PositiveInt = 10
    """Steps between log lines."""
    checkpoint_every: PositiveInt = 500
    """Steps between saved training states."""
    validate_every: PositiveInt | None = None
    """Steps between validations within a segment, whose results are logged as `val/…`. null: only at its end. There are
    no validations during a `handover`."""
    keep: Literal["last", "best"] = "last"
    """The weights with which a segment ends: those of its `last` step, or those of the validation with the lowest loss
    (`best`), the end of the segment included."""
    evaluation: EvaluationSettings = EvaluationSettings()
    transfer: Transfer = Transfer()
    weights: str | None = None
    """Checkpoint to use instead of training a root stage: the name of a bundled codec, or a file relative to the
    recipe's folder. It is used only if it was trained for the same λ and metric. null: the schedule trains it."""
    needs: tuple[Literal["gpu", "images"], ...] = ()
    """What the stage needs: a `gpu`, and training `images` of your own. `hpcm run` asks before it trains without
    them."""
    schedule: tuple[Segment, ...]
    accept: Accept = Accept()

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        problems = _schedule_problems(self)
        if self.data.batch_size % self.data.accumulate:
            uneven = f"a batch of {self.data.batch_size} cannot be computed in {self.data.accumulate} equal parts"
            problems.append((("data", "accumulate"), uneven))
        if self.keep == "best" and self.validate_every is None:
            problems.append((("keep",), "'best' needs validations to choose from; set validate_every"))
        if self.data.crop < METRICS[self.metric]:
            least = f"'metric: {self.metric}' needs at least {METRICS[self.metric]} pixels a side, such as 256"
            problems.append((("data", "crop"), f"{self.data.crop} is too small: {least}"))
        if self.parent is None and self.transfer != Transfer():
            problems.append((("transfer",), "a stage without a parent has nothing to transfer"))
        if self.parent is not None and self.weights is not None:
            problems.append((("weights",), "a stage with a parent starts from the parent's weights"))
        if problems:
            raise PydanticCustomError("misfit", "the fields of the stage do not agree", {"problems": problems})
        return self

    def influences(self) -> dict[str, Any]:
        """The fields that influence the trained weights.

        They omit the intervals of logging and saving, evaluation, acceptance, gradient checkpointing, micro-batches,
        the path in `weights`, data workers and the paths of the images. The images have a digest of their own. Fields
        that earlier versions lack are omitted at their defaults, so that stages that those versions built stay current.
        """
        fields = self.model_dump(mode="json", exclude=WITHOUT_INFLUENCE)
        if self.keep == "last":
            del fields["keep"], fields["validate_every"]
        else:
            fields["evaluation"] = {"images": self.evaluation.images}
        if not self.optimizer.weight_decay:
            del fields["optimizer"]["weight_decay"]
        return fields

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the fields that influence the trained weights."""
        fields = self.influences()
        for segment in fields["schedule"]:
            segment["lr"] = list(segment["lr"].items())  # The first entry that matches wins.
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The stage as YAML with all defaults written out; reading it gives the same stage."""
        fields = self.model_dump(mode="json")
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)


def _schedule_problems(stage: Stage) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    for index, segment in enumerate(stage.schedule):
        at = ("schedule", index)
        if segment.name in seen:
            problems.append(((*at, "name"), f"another segment is named '{segment.name}'"))
        seen.add(segment.name)
        for key, length in (("handover", segment.handover), ("warmup", segment.warmup)):
            if length > segment.steps:
                problems.append(((*at, key), f"{length} steps are more than the segment's {segment.steps}"))
        if isinstance(segment.decay, StepDecay):
            problems += [((*at, *where), problem) for where, problem in decay_problems(segment.decay, segment.steps)]
        traits = OBJECTIVES[segment.objective]
        if segment.handover and (stage.parent is None or not traits.handover):
            problems.append(((*at, "handover"), "needs a parent and an objective that runs the whole codec"))
        if traits.needs_parent and stage.parent is None:
            problems.append(((*at, "objective"), f"'{segment.objective}' needs a parent"))
        if traits.new_alone and segment.train != "new":
            problems.append(((*at, "objective"), f"'{segment.objective}' needs 'train: new'"))
    return problems
