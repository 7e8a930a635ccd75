"""Runs a few real steps of a segment, and codes some images, to measure time and memory without training a stage."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from modules import HPCM, HPCMConfig
from pipeline.common.memory import largest_resident_size
from pipeline.common.processes import ProcessGroup, start_accelerator
from pipeline.common.timing import machine
from pipeline.data.crops import StepBatches, TrainingCrops, training_loader, validation_images
from pipeline.data.images import Photos
from pipeline.evaluation.coding import code, estimate
from pipeline.evaluation.metrics import NamedImage
from pipeline.recipes.schema import Stage
from pipeline.training.estimate import EvaluationCost, StepCost
from pipeline.training.objectives import with_noise
from pipeline.training.reporting import Reporting, Watcher
from pipeline.training.trainer import Trainer
from pipeline.training.transfer import Migration, new_tensors, tensors_to_copy
from pipeline.weights.checkpoints import codec_tensors
from pipeline.weights.training_state import Progress, StateFolder, TrainingState

BATCHES = 16
"""Batches that the loader alone reads. Only the second half is timed, because the first batches were prefetched."""
IMAGES = 2
"""Validation images that are measured, at most."""


@dataclass(frozen=True)
class Trial:
    """A stage to try, and its codec and parent. For a segment, the schedule is that segment alone. It is pickled."""

    stage: Stage
    config: HPCMConfig
    parent: HPCMConfig | None


@dataclass(frozen=True)
class Limits:
    """How many steps are timed: until they took `seconds`, but at least `least` and at most `most`."""

    warm: int = 2
    """Steps before, in which caches, memory pools and kernels are set up."""
    least: int = 3
    most: int = 20
    seconds: float = 10.0


PLANNED = Limits()
"""How `hpcm plan --measure` measures."""


def try_segment(trial: Trial, photos: Photos) -> tuple[str, StepCost]:
    """Train some steps of a segment from random weights. Returns the device's name and the cost of a step.

    If memory is short, it raises PyTorch's own error.
    """
    accelerator = start_accelerator(trial.stage.precision)
    segment, data = trial.stage.schedule[0], trial.stage.data
    crops, processes = TrainingCrops(photos, data.crop, trial.stage.seed), ProcessGroup(accelerator)
    begin, warm_up = step_seconds(trial, crops, processes)
    step = step_seconds(trial, crops, processes, segment.handover)[0] if segment.handover else begin
    cost = StepCost(step, begin, _batch_seconds(trial, crops), *_memory(accelerator.device), warm_up)
    return machine(str(accelerator.device)), cost


def try_evaluation(trial: Trial, photos: Photos) -> EvaluationCost:
    """Evaluate some validation images with random weights. Returns the cost of all of them.

    If memory is short, it raises PyTorch's own error.
    """
    stage, device = trial.stage, start_accelerator(trial.stage.precision).device
    model = HPCM(trial.config).to(device).eval()
    model.update(force=True)
    count = len(photos.paths)
    used = min(count, stage.evaluation.images or count)
    images = list(islice(validation_images(photos, used), IMAGES))
    pixels = photos.pixels * used / count
    estimating = _seconds_per_pixel(images, lambda image: estimate(model, [image], stage.lmbda, stage.metric))
    coding = _seconds_per_pixel(images, lambda image: code(model, image, stage.lmbda, stage.metric))
    return EvaluationCost(pixels * estimating, pixels * coding, *_memory(device))


def _seconds_per_pixel(images: Sequence[NamedImage], measure: Callable[[NamedImage], object]) -> float:
    """Mean seconds per pixel, over as many images as the limit allows. The first image is also a warm-up."""
    measure(images[0])
    began, pixels = time.perf_counter(), 0
    for named in images:
        measure(named)
        pixels += named[1].shape[2] * named[1].shape[3]
        if time.perf_counter() - began > PLANNED.seconds:
            break
    return (time.perf_counter() - began) / pixels


def _memory(device: torch.device) -> tuple[int, int | None]:
    """Peak memory in bytes of this process, and of a GPU."""
    return largest_resident_size(), torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


class _Enough(Exception):
    """Enough steps were timed."""


class _Timing(Watcher):
    """Keeps the times of the steps, and stops the training after enough of them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.seconds: list[float] = []

    def step(self, values: dict[str, float] | None) -> None:
        self.seconds.append(values["step_seconds"] if values and "step_seconds" in values else float("nan"))
        timed, limits = self.seconds[self.limits.warm :], self.limits
        if len(timed) >= limits.most or (len(timed) >= limits.least and sum(timed) >= limits.seconds):
            raise _Enough


def step_seconds(
    trial: Trial, crops: TrainingCrops, processes: ProcessGroup, first: int = 0, limits: Limits | None = None
) -> tuple[float, float]:
    """Median time of a step, from step `first` of the segment, and what the first steps take longer than that.

    The weights are random. `processes` must not be entered: a signal shall end the measurement at once.
    """
    limits, segment = limits or PLANNED, trial.stage.schedule[0]
    child, parent = HPCM(trial.config), HPCM(trial.parent) if trial.parent else None
    new = frozenset(child.state_dict())
    if parent is not None:
        new = new_tensors(parent, child, tensors_to_copy(parent, child, trial.stage.transfer))
    # So long that the segment's end, with its saving and reporting, is never reached.
    endless = segment.model_copy(update={"steps": segment.steps + segment.handover + 10 * limits.most})
    stage = trial.stage.model_copy(update={"schedule": (endless,), "log_every": 1, "checkpoint_every": 10**9})
    watcher, migration = _Timing(limits), Migration(child, parent, new)
    trainer = Trainer(stage, migration, crops, processes, StateFolder(Path()), Reporting(watcher=watcher))
    with suppress(_Enough):
        trainer.train(TrainingState(Progress(step=first, stage_step=first), codec_tensors(child)))
    timed = [seconds for seconds in watcher.seconds[limits.warm :] if seconds == seconds]
    step = median(timed or [float("nan")])
    return step, sum(max(0.0, seconds - step) for seconds in watcher.seconds[: limits.warm])


def _batch_seconds(trial: Trial, crops: TrainingCrops) -> float:
    """Mean seconds that the loader alone, with its workers, takes for a batch."""
    data, noise = trial.stage.data, partial(with_noise, HPCM.on_meta(trial.config), crops.seed)
    began = time.perf_counter()
    for number, _ in enumerate(training_loader(crops, StepBatches(0, BATCHES, data.batch_size), data.workers, noise)):
        if number == BATCHES // 2 - 1:
            began = time.perf_counter()
    return (time.perf_counter() - began) / (BATCHES - BATCHES // 2)
