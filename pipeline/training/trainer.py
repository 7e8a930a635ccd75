"""Trains a stage through the segments of its schedule, with Accelerate."""

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from modules import Noise
from pipeline.common.errors import Interrupted, UserError
from pipeline.common.fault_injection import fault
from pipeline.common.processes import ProcessGroup
from pipeline.data.crops import StepBatches, TrainingCrops, training_loader
from pipeline.evaluation.metrics import metric_named
from pipeline.recipes.registered import OBJECTIVES
from pipeline.recipes.schema import Segment, Stage
from pipeline.training.cuda_graph import Compute, GraphedGradients
from pipeline.training.learning_rate import schedule_factor
from pipeline.training.objectives import Handover, ObjectiveContext, build_objective, training_noise
from pipeline.training.parameter_groups import parameter_groups, set_trainable, trainable_names, with_weight_decay
from pipeline.training.reporting import Migration, Reporting
from pipeline.training.segment_validation import SegmentValidation
from pipeline.training.weight_average import WeightAverage
from pipeline.weights.checkpoints import codec_tensors, load_weights
from pipeline.weights.training_state import Progress, StateFolder, TrainingState, optimizer_tensors, restore_optimizer

LOSSES_KEPT = 32
"""Number of recent losses in the running median."""
EXPLODED = 10.0
"""A loss above this many times the median is reported as exploding."""


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
        reporting: Reporting | None = None,
    ):
        self.stage, self.migration, self.crops, self.processes = stage, migration, crops, processes
        self.accelerator = processes.accelerator
        self.reporting = reporting or Reporting()
        migration.child.set_gradient_checkpointing(stage.gradient_checkpointing)

    def train(self, states: StateFolder, start: TrainingState) -> TrainingState:
        """Train to the end of the schedule and save states into `states`.

        After a signal it saves and raises Interrupted. After more than `max_bad_steps` non-finite steps in a row it
        raises TrainingError.
        """
        state = start
        load_weights(self.migration.child, state.model, "training state")
        while state.progress.segment < len(self.stage.schedule):
            segment = self.stage.schedule[state.progress.segment]
            progress = _SegmentRun(self, segment, states, state).train()
            self._validate(segment, progress)
            state = replace(
                state,
                progress=progress.next_segment(),
                model=codec_tensors(self.migration.child),
                optimizer={},
                average={},
                best={},
            )
            self.processes.on_main_process(partial(self.save, states, state))
            fault("segment")
        return state

    def save(self, states: StateFolder, state: TrainingState) -> None:
        """Save a state, with the number of lines of the metrics that precede it. Only the first process calls it."""
        state = replace(state, progress=replace(state.progress, lines=self.reporting.metrics.lines))
        states.save(state)
        self.reporting.saved(state.progress)

    def _validate(self, segment: Segment, progress: Progress) -> None:
        if self.reporting.measure is None:
            return
        quality = self.processes.of_main_process(self.reporting.measure)
        self.reporting.validated(f"after {segment.name}", quality, progress.stage_step)
        self.reporting.segment_ended(segment, progress, quality)


class _SegmentRun:
    """One segment, with its trainable parameters, optimizer and objective."""

    def __init__(self, trainer: Trainer, segment: Segment, states: StateFolder, state: TrainingState):
        self.trainer, self.segment, self.states, self.facts = trainer, segment, states, state.facts
        self.stage, self.accelerator = trainer.stage, trainer.accelerator
        self.progress = state.progress
        migration = trainer.migration
        self.child = migration.child.train().to(self.accelerator.device)
        set_trainable(self.child, trainable_names(self.child, segment.train, migration.new))
        groups = parameter_groups(self.child, segment.lr, migration.new)
        settings = self.stage.optimizer
        if settings.weight_decay:
            groups = with_weight_decay(groups, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=0, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        if state.optimizer:
            restore_optimizer(self.optimizer, state.optimizer)
        self.average = WeightAverage(self.child, self.stage.ema) if self.stage.ema else None
        if self.average is not None and state.average:
            self.average.restore(state.average)
        self.validation = SegmentValidation(self.child, self.stage, segment, trainer.processes, trainer.reporting)
        self.validation.restore(state.best)
        if migration.parent is not None:
            migration.parent.requires_grad_(False).to(self.accelerator.device)
        self.handover = None
        if self.progress.step < segment.handover and migration.parent is not None:
            self.handover = Handover(self.child, migration.parent, migration.components)
        objective = self._objective()
        if self.stage.compile:
            objective.compile()
        self.objective = self.accelerator.prepare(objective)
        self.trainable = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # Several processes exchange gradients in the backward pass, and MS-SSIM copies its window from the CPU.
        capturable = self.accelerator.num_processes == 1 and self.stage.metric == "mse" and not self.stage.compile
        self.graphed = self.stage.cuda_graph and capturable and self.accelerator.device.type == "cuda"
        self.compute = self._computation()

    def _computation(self) -> Compute:
        return GraphedGradients(self._backward, self.trainable) if self.graphed else self._backward

    def _backward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch's share of the loss. Returns the objective's values."""
        values = self.objective(images, noise)
        self.accelerator.backward(values["loss"] / self.stage.data.accumulate)
        return {name: value.detach() for name, value in values.items()}

    def _objective(self) -> nn.Module:
        migration = self.trainer.migration
        context = ObjectiveContext(
            self.child, migration.parent, migration.components, self.stage.lmbda, self.stage.metric
        )
        return build_objective(self.segment.objective, context)

    def train(self) -> Progress:
        """Run the remaining steps of the segment."""
        self.trainer.reporting.watcher.segment(self.segment, self.progress.step)
        batches = StepBatches(
            self.progress.stage_step,
            self.segment.steps - self.progress.step,
            self.stage.data.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.stage.data.accumulate,
        )
        try:
            if self._validation_is_due():  # A state is saved before the validation at its step.
                self.progress = self.validation.validate(self.progress, self.average)
            for batch in training_loader(self.trainer.crops, batches, self.stage.data.workers):
                started = time.perf_counter()
                outcome = self._step(batch["image"], batch["sample"].tolist())
                self._count(outcome, time.perf_counter() - started)
                self._save_if_due()
                if self._validation_is_due():
                    self.progress = self.validation.validate(self.progress, self.average)
        finally:
            if self.handover is not None:
                self.handover.end()
            self.accelerator.free_memory()
        if self.average is not None:
            self.average.apply()
        self.validation.end(self.progress)
        return self.progress

    def _step(self, images: Tensor, samples: list[int]) -> dict[str, float] | None:
        """One update. Returns the objective's values, or None if a non-finite loss or gradient skipped the update."""
        step = self.progress.step
        factor = schedule_factor(self.segment, step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if self.handover is not None:
            self.handover.share.fill_(step / self.segment.handover)
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        values = self._gradients(images, samples)
        norm = self.accelerator.clip_grad_norm_(self.trainable, self.stage.optimizer.clip_norm)
        if self.handover is not None and step + 1 == self.segment.handover:
            self.handover.end()
            self.handover = None
            self.compute = self._computation()  # A graph with the parent's components is of no more use.
        means = self.accelerator.reduce(torch.stack([*values.values()]), "mean")
        # Loss and gradient are means over all processes, so all processes decide alike.
        if not (torch.isfinite(norm) and torch.isfinite(means).all()):
            return None
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)
        return {**dict(zip(values, means.tolist(), strict=True)), "grad_norm": float(norm)}

    def _gradients(self, images: Tensor, samples: list[int]) -> dict[str, Tensor]:
        """Compute the gradients of the mean over all micro-batches. Returns the means of the objective's values."""
        device, parts = self.accelerator.device, self.stage.data.accumulate
        size = len(samples) // parts
        means: dict[str, Tensor] = {}
        for part in range(parts):
            chosen = slice(part * size, (part + 1) * size)
            crops = images[chosen]
            noise = training_noise(self.child, (*crops.shape[2:],), self.trainer.crops.seed, samples[chosen])
            # The processes exchange gradients once per step.
            alone = self.accelerator.no_sync(self.objective) if part < parts - 1 else nullcontext()
            with alone:
                values = self.compute(crops.to(device), Noise(*(tensor.to(device) for tensor in noise)))
            for name, value in values.items():
                means[name] = means.get(name, 0) + value / parts
        return means

    def _count(self, outcome: dict[str, float] | None, seconds: float) -> None:
        bad = outcome is None
        losses, exploded = self._watch_loss(outcome["loss"]) if outcome else (self.progress.losses, False)
        window = dict(self.progress.window)
        for key, value in {**outcome, "step_seconds": seconds}.items() if outcome else ():
            window[key] = window.get(key, 0.0) + value
        window["count"] = window.get("count", 0) + (not bad)
        self.progress = progress = replace(
            self.progress,
            step=self.progress.step + 1,
            stage_step=self.progress.stage_step + 1,
            bad_steps=self.progress.bad_steps + bad,
            consecutive_bad=self.progress.consecutive_bad + 1 if bad else 0,
            seconds=self.progress.seconds + seconds,
            losses=losses,
            exploded_steps=self.progress.exploded_steps + exploded,
            window=window,
        )
        values = None
        if progress.stage_step % self.stage.log_every == 0 or progress.step == self.segment.steps:
            values = self._report(window)
            self.progress = replace(progress, window={})
        self.trainer.reporting.watcher.step(values)
        if progress.consecutive_bad > self.stage.optimizer.max_bad_steps:
            raise TrainingError(
                f"{self.stage.name}/{self.segment.name}: {progress.consecutive_bad} steps in a row had a loss or "
                f"gradient that is not finite, up to step {progress.step}. The last good state is kept in "
                f"{self.states.folder}. Check the data and run the same command to continue, "
                "or lower the learning rate, which starts the stage again."
            )

    def _watch_loss(self, loss: float) -> tuple[list[float], bool]:
        """The recent losses including this one, and whether it explodes. An exploding loss is reported."""
        before = self.progress.losses
        known = OBJECTIVES[self.segment.objective].steady and len(before) == LOSSES_KEPT
        exploded = known and loss > EXPLODED * median(before)
        if exploded:
            self.trainer.reporting.watcher.note(
                f"{self.segment.name}, step {self.progress.step + 1}: the loss explodes: {loss:.4g}; the median "
                f"of the last {LOSSES_KEPT} steps is {median(before):.4g}"
            )
        return [*before, loss][-LOSSES_KEPT:], exploded

    def _report(self, window: dict[str, float]) -> dict[str, float]:
        """Log the means since the last report, under names with segment and unit."""
        count = window.get("count", 0)
        values = {key: value / count for key, value in window.items() if key != "count"} if count else {}
        if "distortion" in values:
            metric = metric_named(self.stage.metric)
            values[metric.shown_as or metric.name] = metric.shown(values.pop("distortion"))
        prefix = f"train/{self.segment.name}"
        rates = {f"{prefix}/lr_{g['key']}": g["lr"] for g in self.optimizer.param_groups if g["key"].isidentifier()}
        counts = {
            f"{prefix}/skipped_steps": float(self.progress.bad_steps),
            f"{prefix}/exploded_steps": float(self.progress.exploded_steps),
        }
        named = {f"{prefix}/{key}": value for key, value in values.items()}
        self.trainer.reporting.metrics.append({**named, **rates, **counts}, self.progress.stage_step)
        return values

    def _save_if_due(self) -> None:
        signum = self.trainer.processes.agreed_signal()
        # Save also before a validation, which can take long. The end of the segment has a validation too.
        due = self.progress.step % self.stage.checkpoint_every == 0 or self._validation_is_due()
        if signum or due or self.progress.step == self.segment.steps:
            self.trainer.processes.on_main_process(self._save)
        fault("step")
        if signum:
            raise Interrupted(signum)

    def _save(self) -> None:
        average = self.average.values if self.average is not None else {}
        tensors = codec_tensors(self.child), optimizer_tensors(self.optimizer)
        state = TrainingState(self.progress, *tensors, self.facts, average, self.validation.best)
        self.trainer.save(self.states, state)

    def _validation_is_due(self) -> bool:
        # During a handover the parent's components contribute, so the child alone is not the codec that is trained.
        return self.handover is None and self.validation.is_due(self.progress.step)
