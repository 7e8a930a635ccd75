"""The codecs that `hpcm compare` measures, and the measurements of one of them."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonpath
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modules import HPCM, HPCMConfig
from pipeline.common.errors import UserError
from pipeline.common.memory import largest_resident_size
from pipeline.common.processes import ProcessGroup, start_accelerator
from pipeline.common.timing import timed
from pipeline.data.crops import TrainingCrops, to_tensor
from pipeline.data.images import find_images
from pipeline.data.pictures import read_image
from pipeline.recipes.loading import Recipe
from pipeline.recipes.schema import Data, ModelChoice, Segment, Stage
from pipeline.training.codec_choice import config_of
from pipeline.training.trial import Limits, Trial, step_seconds
from pipeline.weights.checkpoints import load_codec

SHORTEST = 0.2
"""Seconds for which a measurement repeats an activity."""
TRAINED: dict[str, Literal["new", "all"]] = {"frozen": "new", "unfrozen": "all"}
"""What training steps train, by activity. `frozen` is what is new against the codec's parent."""
ACTIVITIES = ("encode", "decode", *TRAINED)

Size = tuple[int, int]


class ComparisonError(UserError):
    """Codecs that cannot be compared. The message says why and what to do."""


@dataclass(frozen=True)
class Contender:
    """A codec to measure: a published checkpoint, or untrained."""

    name: str
    config: HPCMConfig
    checkpoint: Path | None = None
    parent: HPCMConfig | None = None
    """The parent's configuration."""

    def codec(self, device: str) -> HPCM:
        """Build the codec, ready for coding."""
        if self.checkpoint is not None:
            return load_codec(self.checkpoint).to(device)
        torch.manual_seed(0)
        model = HPCM(self.config).to(device).eval()
        model.update()
        return model

    @cached_property
    def activities(self) -> tuple[str, ...]:
        """The activities that can be measured: `frozen` only if something is new against the parent."""
        grown = self.parent is not None and self.parent != self.config
        return tuple(activity for activity in ACTIVITIES if grown or activity != "frozen")

    def seconds(self, activity: str, size: Size, device: str) -> float:
        """Median seconds of an activity on one image."""
        image = photograph(size)
        return self._step(activity, image, device) if activity in TRAINED else self._coding(activity, image, device)

    def peak(self, activity: str, size: Size, device: str) -> int:
        """Peak memory of an activity in bytes; for decoding, of encoding and decoding. Call it in a fresh process.

        On a GPU this is the most that PyTorch allocated. On a CPU it is the growth of the process's peak resident size,
        so that Python and PyTorch themselves are not counted.
        """
        before = largest_resident_size()
        self.seconds(activity, size, device)
        return largest_resident_size() - before if device == "cpu" else torch.cuda.max_memory_allocated(device)

    def _coding(self, activity: str, image: Tensor, device: str) -> float:
        model, image = self.codec(device), image.to(device)
        coded = model.compress(image)
        call = {"encode": lambda: model.compress(image), "decode": lambda: model.decompress(**coded)}[activity]
        call()  # warms up
        times: list[float] = []
        while sum(times) < SHORTEST:
            times.append(timed(call, image.device))
        return statistics.median(times)

    def _step(self, activity: str, image: Tensor, device: str) -> float:
        segment = Segment(
            name=activity, train=TRAINED[activity], objective="rate-distortion", steps=0, lr={"default": 1e-6}
        )
        stage = Stage(
            name="compared",
            parent="parent" if self.parent else None,
            model=ModelChoice(preset="tiny", phase=0),
            lmbda=0.013,
            data=Data(crop=min(image.shape[2:]), batch_size=1),
            schedule=(segment,),
        )
        if device != "cpu":
            torch.cuda.set_device(device)  # where Accelerate then trains
        processes = ProcessGroup(start_accelerator(stage.precision, cpu=device == "cpu"))
        limits = Limits(warm=1, least=1, most=1000, seconds=SHORTEST)
        trial = Trial(stage, self.config, self.parent)
        return step_seconds(trial, OneImage(image), processes, limits=limits)[0]


class OneImage(TrainingCrops):
    """One image (1, 3, H, W) in place of training crops."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.seed = image[0], 0

    def __getitem__(self, n: int) -> dict[str, Tensor | int]:
        """The image, as sample n."""
        return {"image": self.image, "sample": n}


def photograph(size: Size) -> Tensor:
    """A packaged photograph, cropped or extended by reflection to (1, 3, H, W)."""
    pixels = read_image(Path(find_images(None, "val", 1).paths[0]))[: size[0], : size[1]]
    missing = [(0, side - have) for side, have in zip(size, pixels.shape[:2], strict=True)]
    pixels = np.pad(pixels, [*missing, (0, 0)], mode="symmetric")
    return to_tensor(pixels)[None]


def of_recipe(recipe: Recipe) -> list[Contender]:
    """The codecs of a recipe's stages, untrained: the longest chains first, parents before children.

    Of equal codecs only the first is included. A control, for example, equals the Baseline. Raises RecipeError for
    invalid model settings.
    """
    found: dict[HPCMConfig, Contender] = {}
    configs = {name: config_of(stage, recipe.sources[name]) for name, stage in recipe.stages.items()}
    for target in sorted(recipe.stages, key=lambda name: -len(recipe.chain(name))):
        for stage in recipe.chain(target):
            parent = configs[stage.parent] if stage.parent else None
            found.setdefault(configs[stage.name], Contender(stage.name, configs[stage.name], parent=parent))
    return list(found.values())


def of_checkpoints(paths: Sequence[Path]) -> list[Contender]:
    """The codecs of files, named by their stages, or by their paths if several stages have the same name.

    A codec's parent is looked up among them by the digest in its lineage. Raises CheckpointError for a file that
    `load_codec` refuses, ComparisonError for a file given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ComparisonError("a checkpoint is given twice; give each one once")
    models = {path: load_codec(path) for path in paths}
    digests = {model.lineage["digest"]: model.config for model in models.values()}
    names = {path: model.lineage.get("name") or path.stem for path, model in models.items()}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    common = commonpath([path.resolve().parent for path in paths])
    found = []
    for path, model in models.items():
        name = path.resolve().relative_to(common).as_posix() if names[path] in shared else names[path]
        parent = model.lineage.get("inputs", {}).get("parent")
        found.append(Contender(name, model.config, path, digests.get(parent)))
    return found
