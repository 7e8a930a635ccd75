"""Trains a stage through the segments of its schedule, with Accelerate."""

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from modules import Noise
from pipeline.common.errors import Interrupted, UserError
from pipeline.common.fault_injection import fault
from pipeline.common.processes import ProcessGroup
from pipeline.data.crops import StepBatches, TrainingCrops, training_loader
from pipeline.recipes.schema import Segment, Stage
from pipeline.training.gradients import Gradients
from pipeline.training.objectives import with_noise
from pipeline.training.optimizer import (
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rates,
    set_trainable,
    trainable_names,
)
from pipeline.training.reporting import Meter, Reporting
from pipeline.training.transfer import Migration
from pipeline.training.validation import SegmentValidation, WeightAverage, copy_into
from pipeline.weights.checkpoints import codec_tensors, load_weights
from pipeline.weights.training_state import StateFolder, TrainingState


class TrainingError(UserError):
    """Training cannot continue. The last good state is kept."""


class Trainer:
    """Trains a stage's child from any training state to the end of its schedule."""

    def __init__(
        self,
        stage: Stage,
        migration: Migration,
        crops: TrainingCrops,
        processes: ProcessGroup,
        states: StateFolder,
        reporting: Reporting | None = None,
    ):
        self.stage, self.migration, self.crops, self.processes, self.states = stage, migration, crops, processes, states
        self.reporting = reporting or Reporting()
        migration.child.set_gradient_checkpointing(stage.gradient_checkpointing)

    def train(self, state: TrainingState) -> TrainingState:
        """Train to the end of the schedule, and save states on the way. Returns the last state.

        After a signal it saves and raises Interrupted. After more than `max_bad_steps` non-finite steps in a row it
        raises TrainingError.
        """
        load_weights(self.migration.child, state.model, "training state")
        while state.progress.segment < len(self.stage.schedule):
            segment_run = SegmentRun(self, self.stage.schedule[state.progress.segment], state)
            segment_run.train()
            state = TrainingState(segment_run.progress.next_segment(), codec_tensors(self.migration.child))
            self.processes.on_main_process(partial(self.save, state))
            fault("segment")
        return state

    def save(self, state: TrainingState) -> None:
        """Save a state, with the number of lines of the metrics that precede it. Only the first process calls it.

        Raises FileError, also if the stage's folder was moved or replaced.
        """
        self.reporting.metrics.check()
        state = replace(state, progress=replace(state.progress, lines=self.reporting.metrics.lines))
        self.states.save(state)
        self.reporting.saved(state.progress)


class SegmentRun:
    """The steps of one segment, from a training state on."""

    def __init__(self, trainer: Trainer, segment: Segment, state: TrainingState):
        self.trainer, self.segment, self.progress = trainer, segment, state.progress
        self.stage, self.processes = trainer.stage, trainer.processes
        self.accelerator = self.processes.accelerator
        migration, reporting = trainer.migration, trainer.reporting
        self.child = migration.child.train().to(self.accelerator.device)
        self.processes.share([*self.child.parameters()])  # Each may have rounded its transfer in its own way.
        set_trainable(self.child, trainable_names(self.child, segment.train, migration.new))
        self.optimizer = build_optimizer(self.child, self.stage, segment, migration.new)
        restore_optimizer(self.optimizer, state.optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.average = WeightAverage(self.child, self.stage.ema) if self.stage.ema else None
        if self.average is not None and state.average:
            copy_into(self.average.values, state.average)
        self.validation = SegmentValidation(self.child, self.stage, segment, self.processes, reporting)
        self.validation.restore(state.best)
        self.gradients = Gradients(self.stage, segment, migration, self.parameters, self.accelerator)
        self.meter = Meter(self.stage, segment, self.optimizer, reporting)

    def train(self) -> None:
        """Train to the end of the segment. It ends with the weights of the average or of the best validation."""
        watcher = self.trainer.reporting.watcher
        watcher.segment(self.segment, self.progress.step)
        if self.gradients.not_graphed:
            watcher.note(f"cuda_graph has no effect: {self.gradients.not_graphed}")
        try:
            self._validate_if_due()  # A state is saved before the validation at its step.
            crops, workers = self.trainer.crops, self.stage.data.workers
            for batch in training_loader(crops, self._batches(), workers, partial(with_noise, self.child, crops.seed)):
                began = time.perf_counter()
                values = self._step(batch["image"], batch["noise"])
                self.progress = self.meter.count(self.progress, values, time.perf_counter() - began)
                self._stop_if_not_finite()
                self._save_if_due()
                self._validate_if_due()
        finally:
            self.gradients.end()
        if self.average is not None:
            self.average.apply()
        self.validation.end(self.progress)

    def _batches(self) -> StepBatches:
        data, processes = self.stage.data, (self.accelerator.process_index, self.accelerator.num_processes)
        left = self.segment.steps - self.progress.step
        return StepBatches(self.progress.stage_step, left, data.batch_size, *processes, data.accumulate)

    def _step(self, images: Tensor, noise: Noise) -> dict[str, float] | None:
        """One update. Returns the objective's values, or None if a non-finite loss or gradient skipped the update."""
        step = self.progress.step
        set_learning_rates(self.optimizer, self.segment, step)
        self.optimizer.zero_grad(set_to_none=not self.gradients.graphed)
        values = self.gradients(step, images, noise)
        means = torch.stack([*values.values()])
        self.processes.average([means, *(p.grad for p in self.parameters if p.grad is not None)])
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.stage.optimizer.clip_norm)
        # Loss and gradient are means over all processes, so all processes decide alike.
        if not (torch.isfinite(norm) and torch.isfinite(means).all()):
            return None
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)
        return {**dict(zip(values, means.tolist(), strict=True)), "grad_norm": float(norm)}

    def _stop_if_not_finite(self) -> None:
        if self.progress.consecutive_bad > self.stage.optimizer.max_bad_steps:
            raise TrainingError(
                f"{self.stage.name}/{self.segment.name}: {self.progress.consecutive_bad} steps in a row had a loss or "
                f"gradient that is not finite, up to step {self.progress.step}. The last good state is kept in "
                f"{self.trainer.states.folder}. Check the data and run the same command to continue, "
                "or lower the learning rate, which starts the stage again."
            )

    def _save_if_due(self) -> None:
        """Save at a signal, every `checkpoint_every` steps, and before a validation, which can take long."""
        step, signum = self.progress.step, self.processes.agreed_signal()
        validation = step == self.segment.steps or self.validation.is_due(step)
        if signum or validation or step % self.stage.checkpoint_every == 0:
            self.processes.on_main_process(self._save)
        fault("step")
        if signum:
            raise Interrupted(signum)

    def _save(self) -> None:
        average = self.average.values if self.average is not None else {}
        tensors = codec_tensors(self.child), optimizer_tensors(self.optimizer)
        self.trainer.save(TrainingState(self.progress, *tensors, average, self.validation.best))

    def _validate_if_due(self) -> None:
        if self.validation.is_due(self.progress.step):
            self.progress = self.validation.validate(self.progress, self.average)
