"""The weights with which a segment ends: their moving average, and the choice of the best by validations."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.common.processes import ProcessGroup
from pipeline.recipes.schema import Segment, Stage
from pipeline.training.reporting import Reporting
from pipeline.weights.published import Quality
from pipeline.weights.training_state import Progress


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give tensors the values that have the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


class WeightAverage:
    """The exponential moving average of a segment's trainable parameters. It starts at their initial values.

    It has less noise than the last step and costs nothing in decoding. After n updates the decay is
    min(decay, (1 + n) / (10 + n)), so that the initial weights do not dominate a short segment.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Update after a step. `updates` is the number of earlier updates."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)))
        average(list(self.values.values()), [p.detach() for p in self.parameters.values()], updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters the values of the average while the context lasts."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.apply()
        try:
            yield
        finally:
            copy_into(self.parameters, trained)

    def apply(self) -> None:
        """Copy the average into the parameters."""
        copy_into(self.parameters, self.values)


class SegmentValidation:
    """Validates a model every `validate_every` steps of a segment and at its end. Keeps weights for `keep: best`."""

    def __init__(self, model: nn.Module, stage: Stage, segment: Segment, processes: ProcessGroup, reporting: Reporting):
        self.stage, self.segment, self.processes, self.reporting = stage, segment, processes, reporting
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.best: dict[str, Tensor] = {}
        """The trainable parameters at the segment's lowest validation loss, by name; empty without `keep: best`."""

    def restore(self, best: Mapping[str, Tensor]) -> None:
        """Continue with the best weights of a saved state."""
        self.best = {name: value.to(self.parameters[name].device, copy=True) for name, value in best.items()}

    def is_due(self, step: int) -> bool:
        """Whether to validate after this step of the segment. Its end is validated by `end`."""
        every = self.stage.validate_every
        # During a handover the parent's components contribute, so the child alone is not the codec that is trained.
        return bool(every and self.segment.handover <= step < self.segment.steps and step and step % every == 0)

    def validate(self, progress: Progress, average: WeightAverage | None) -> Progress:
        """Validate the weights with which the segment would end now. Returns progress with the best loss so far."""
        with average.applied() if average is not None else nullcontext():
            quality = self._measure()
            if self.stage.keep == "best" and _is_better(quality, progress):
                progress = replace(progress, best_loss=quality.rd_loss, best_step=progress.step)
                self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.reporting.validated(f"{self.segment.name}, step {progress.step}", quality, progress.stage_step)
        return progress

    def end(self, progress: Progress) -> None:
        """End the segment with its best weights if they are better than the present ones. Validate what it ends with.

        Without images to validate on, do nothing.
        """
        if self.reporting.measure is None:
            return
        quality = self._measure()
        if self.best and not _is_better(quality, progress):
            copy_into(self.parameters, self.best)
            self.reporting.watcher.note(
                f"{self.segment.name} ends with the weights of step {progress.best_step}: their validation loss, "
                f"{progress.best_loss:.4f}, is the lowest"
            )
            quality = self._measure()
        self.reporting.validated(f"after {self.segment.name}", quality, progress.stage_step)
        self.reporting.segment_ended(self.segment.name, self.segment.steps, progress, quality)

    def _measure(self) -> Quality:
        assert self.reporting.measure is not None  # a stage has validation images
        return self.processes.on_main_process(self.reporting.measure)


def _is_better(quality: Quality, progress: Progress) -> bool:
    return math.isfinite(quality.rd_loss) and (progress.best_loss is None or quality.rd_loss < progress.best_loss)
