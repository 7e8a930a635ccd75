"""Runs a stage: transfer, schedule, evaluation, acceptance, publication."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from modules import HPCM, HPCMConfig
from pipeline.chain.acceptance import Refusal, judge
from pipeline.chain.precheck import StageError
from pipeline.chain.publication import Publication
from pipeline.chain.stage_task import RunContext, StageTask
from pipeline.common.fault_injection import fault
from pipeline.common.processes import environment_of
from pipeline.data.crops import TrainingCrops, validation_images
from pipeline.data.images import find_images
from pipeline.data.pictures import DataError
from pipeline.evaluation.coding import (
    comparison_name,
    estimate,
    evaluate,
    plot_rate_distortion,
    save_comparison,
)
from pipeline.evaluation.limits import check_size
from pipeline.evaluation.quality import NamedImage
from pipeline.recipes.schema import Segment, Transfer
from pipeline.tracking.descriptions import NOTE, changes
from pipeline.tracking.provenance import source_tags
from pipeline.tracking.store import Run
from pipeline.tracking.tags import StageTags
from pipeline.training.initial_weights import Start, start_child
from pipeline.training.trainer import Migration, Reporting, Trainer
from pipeline.training.transfer import Ledger, new_components, transfer_weights
from pipeline.weights import checkpoints
from pipeline.weights.checkpoints import CheckpointError, codec_tensors
from pipeline.weights.metadata import read_metadata
from pipeline.weights.published import Lineage, Quality, Validation
from pipeline.weights.training_state import Progress, TrainingState


class StageRun:
    """One attempt at a stage. It continues where the previous attempt stopped."""

    def __init__(self, task: StageTask, context: RunContext, run: Run):
        self.task, self.context, self.run = task, context, run
        self.stage = task.stage
        self._attempt, self._began = "started", int(1000 * time.time())
        self.inputs = task.inputs()
        self.train_photos, self.val_photos = task.train_photos, task.val_photos
        self.states = task.states
        self.device = context.processes.accelerator.device

    @cached_property
    def parent(self) -> HPCM | None:
        """The parent's codec; None for a root. Raises StageError if its file is damaged."""
        if self.task.parent is None:
            return None
        try:
            return checkpoints.load_codec(self.task.parent)
        except CheckpointError as error:
            raise StageError(
                f"{error}.\n  Restore the file from its copy in MLflow, or run: hpcm run {self.stage.parent} --force"
            ) from error

    @cached_property
    def images(self) -> list[NamedImage]:
        """The validation images, in memory. Images too large for the codec are left out.

        Raises DataError if they are no longer those of which the digest was taken.
        """
        sketch = HPCM.on_meta(self.task.config)
        found = []
        for name, image in validation_images(self.val_photos, self.stage.evaluation.images):
            try:
                check_size(sketch, *image.shape[2:])
                found.append((name, image))
            except DataError as error:
                self.context.watcher.note(f"left out of validation: {name}: {error}")
        folder = self.stage.data.val
        if folder and find_images(Path(folder), "val", 1, self.context.runs).digest != self.val_photos.digest:
            raise DataError(
                f"{self.val_photos.source}: the validation images changed during the run; run the same command again"
            )
        if not found:
            raise DataError(f"{self.val_photos.source}: all images are too large for validation; give smaller ones")
        return found

    def execute(self) -> None:
        """Run the stage and publish its result."""
        self._describe()
        if self.task.imported is not None:
            child, state = self._import(self.task.imported), TrainingState(Progress(), {}, {}, {})
        else:
            child, state = self._train()
        child = child.to(self.device).eval().requires_grad_(False)
        self.context.on_main_process(lambda: self._finish(child, state))

    def note_end(self, error: BaseException) -> None:
        """Record the error that ended the attempt."""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        self._tag(StageTags(attempts={self._began: f"{self._attempt}; {reason}"}))

    def _tag(self, tags: StageTags) -> None:
        self.run.tags(tags.to_tags())

    def _describe(self) -> None:
        self.run.tags({**source_tags(self.device), NOTE: self._description()})
        self.run.parameters({**self.stage.model_dump(mode="json"), "codec": self.task.config.to_dict()})
        self.run.dataset(self.train_photos, "training")
        self.run.dataset(self.val_photos, "validation")
        self._tag(StageTags(inputs=self.inputs))
        for photos in (self.train_photos, self.val_photos):
            for path, reason in photos.skipped:
                self.context.watcher.note(f"skipped {path}: {reason}")

    def _description(self) -> str:
        """What the stage changes, for the page of its run."""
        before = read_metadata(self.task.parent)["config"] if self.task.parent else None
        changed = changes(HPCMConfig.from_dict(before).to_dict() if before else None, self.task.config.to_dict())
        begin = f" It begins from `{self.stage.parent}`." if self.stage.parent else ""
        return f"Stage `{self.stage.name}` at λ = {self.stage.lmbda:g}.{begin} {changed}"

    def _import(self, path: Path) -> HPCM:
        model = checkpoints.load_codec(path) if path.suffix == ".safetensors" else checkpoints.import_official(path)
        if model.config != self.task.config:
            found, expected = model.config.to_dict(), self.task.config.to_dict()
            differing = [
                f"{name} is {found[name]}, expected {expected[name]}" for name in found if found[name] != expected[name]
            ]
            raise StageError(
                f"{path}: does not match the recipe's {self.stage.name}: {'; '.join(differing)}.\n"
                "  Give a checkpoint with these settings, or choose a recipe that matches the file."
            )
        return model

    def _train(self) -> tuple[HPCM, TrainingState]:
        seed = int(np.random.SeedSequence([self.stage.seed, *self.stage.name.encode()]).generate_state(1)[0])
        torch.manual_seed(seed)
        child = HPCM(self.task.config)
        crops = TrainingCrops(self.train_photos, self.stage.data.crop, seed)
        state, passed_over = self.states.newest()
        for line in passed_over:
            self.context.watcher.note(line)
        self.context.wait_for_everyone()
        if state is None:
            state = self._begin(child, crops)
        ledger = Ledger.from_json(state.facts["ledger"])
        self._note_start(state, ledger)
        self._note_environment(state)
        components = tuple(new_components(self.parent, child)) if self.parent else ()
        migration = Migration(child, self.parent, components, ledger.new)
        reporting = Reporting(
            self.run,
            self.context.watcher,
            lambda segment, progress: self._validate(child, segment, progress),
            lambda: self._estimate(child),
        )
        trainer = Trainer(self.stage, migration, crops, self.context.processes, reporting)
        return child, trainer.train(self.states, state)

    def _begin(self, child: HPCM, crops: TrainingCrops) -> TrainingState:
        """Transfer weights, and compare child and parent before the first step."""
        child.to(self.device)
        if self.task.start is not None:
            start = Start(transfer_weights(self._import(self.task.start).to(self.device), child, Transfer()))
        elif self.parent is None:
            start = Start(Ledger.of_root(child))
        else:
            start = start_child(self.parent.to(self.device), child, self.stage.transfer, crops)
        facts = start.facts()
        state = TrainingState(Progress(), codec_tensors(child), {}, facts)

        def compare_and_save() -> None:
            if self.parent is not None:
                before, after = self._estimate(self.parent), self._estimate(child)
                gap = after.rd_loss - before.rd_loss
                facts.update(parent=asdict(before), step0=asdict(after), step0_gap=gap)
                self.run.metrics(before.metrics("val/parent"), 0)
                self.run.metrics({**after.metrics("val"), "val/step0_gap": gap}, 0)
            self.states.save(state)

        self.context.on_main_process(compare_and_save)
        return state

    def _note_start(self, state: TrainingState, ledger: Ledger) -> None:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(ledger.counts().items()))
        self.context.watcher.note(f"transfer: {counts}")
        self._tag(StageTags(ledger=counts))
        for what in ("narrowed", "fitted"):
            if errors := [site["error"] for site in state.facts.get(what, ())]:
                modules = f"{len(errors)} module{'s' if len(errors) > 1 else ''}"
                self.context.watcher.note(f"{what} {modules}: at most {max(errors):.1%} of the variance unexplained")
        if "step0_gap" in state.facts:
            self._tag(StageTags(step0_loss=state.facts["step0"]["rd_loss"]))
            self.context.watcher.note(
                f"step 0: estimated validation loss {state.facts['step0']['rd_loss']:.4f}, "
                f"{state.facts['step0_gap']:+z.4f} relative to the parent"
            )
        progress = state.progress
        if progress.stage_step or progress.segment:
            at = [segment.name for segment in self.stage.schedule] + ["evaluation"]
            self._attempt = f"resumed in {at[progress.segment]} at step {progress.step}"
            self.context.watcher.note(self._attempt)
        self._tag(StageTags(attempts={self._began: self._attempt}))

    def _note_environment(self, state: TrainingState) -> None:
        """Record the environment, and report changes since the last state that can change the trained bytes."""
        now = {**environment_of(self.context.processes.accelerator), "Bi-WKV4": self.task.kernel(self.device)}
        now["micro-batches"] = str(self.stage.data.accumulate)
        for name, before in state.facts.get("environment", now).items():
            if now.get(name) != before:
                self.context.watcher.note(
                    f"{name}: {before} before, {now.get(name)} now; the result will be as good as that of an "
                    "uninterrupted run, but not bit for bit the same"
                )
        state.facts["environment"] = now

    def _estimate(self, model: HPCM) -> Quality:
        return estimate(model, self._interruptible(self.images), self.stage.lmbda, self.stage.metric)

    def _interruptible(self, images: list[NamedImage]) -> Iterator[NamedImage]:
        """Yields the images. A signal stops the work between two images."""
        for done, image in enumerate(images):
            self.context.processes.stop_if_asked()
            fault("evaluation")
            self.context.watcher.image(done, len(images))
            yield image
        self.context.processes.stop_if_asked()

    def _validate(self, child: HPCM, segment: Segment, progress: Progress) -> None:
        def measure() -> None:
            quality = self._estimate(child)
            self.run.metrics(quality.metrics("val"), progress.stage_step)
            similarity = f", MS-SSIM {quality.ms_ssim:.4f}" if quality.ms_ssim is not None else ""
            self.context.watcher.note(
                f"after {segment.name}: validation loss {quality.rd_loss:.4f}, estimated {quality.bpp:.4f} bpp, "
                f"{quality.psnr_db:.2f} dB{similarity}"
            )

        self.context.on_main_process(measure)

    def _finish(self, child: HPCM, state: TrainingState) -> None:
        """Evaluate with real bitstreams, check the limits, publish."""
        kept = self.stage.evaluation.reconstructions
        images = self._interruptible(self.images)
        evaluation, reconstructions = evaluate(child, images, self.stage.lmbda, self.stage.metric, kept)
        quality = evaluation.quality
        parent_quality = self._parent_quality()
        refusal = judge(self.stage.accept, quality, parent_quality)
        verdict = "accepted" if not refusal else "accepted anyway" if self.context.accept_anyway else "refused"
        self._tag(StageTags(acceptance="; ".join([verdict, *refusal])))
        change = f", {quality.rd_loss - parent_quality.rd_loss:+z.4f} relative to the parent" if parent_quality else ""
        self.context.watcher.note(
            f"result: {quality.bpp:.4f} coded bpp, {quality.psnr_db:.2f} dB, R-D loss {quality.rd_loss:.4f}{change}"
        )
        if verdict == "refused":
            assert parent_quality is not None  # without a parent nothing is refused
            Refusal(quality, parent_quality).write(self.states.folder)
            raise StageError(
                f"{self.stage.name}: not accepted, compared with its parent: {'; '.join(refusal)}.\n"
                "  The trained state is kept. Relax `accept` in the recipe (or with --set "
                f"{self.stage.name}.accept.…=), or publish the result with --accept-anyway. "
                "A longer schedule trains the stage again from its parent."
            )
        pictures = self.task.folder / "reconstructions"
        shutil.rmtree(pictures, ignore_errors=True)  # An attempt that was killed here may have had other images.
        for (name, image), x_hat in zip(self.images, reconstructions, strict=False):
            save_comparison(pictures / f"{comparison_name(name)}.png", image, x_hat)
        points = {"parent": parent_quality} if parent_quality else {}
        plot_rate_distortion(self.task.folder / "rate-distortion.png", {**points, self.stage.name: quality})
        Publication(
            self.task, self.inputs, child, state, evaluation, self._validation(), parent_quality, self._description()
        ).write(self.run, self.context.runs)
        self.states.forget()

    def _parent_quality(self) -> Quality | None:
        if self.parent is None or self.task.parent is None:
            return None
        lineage = Lineage.read(self.task.parent)
        if lineage.quality is not None and lineage.validation == self._validation():
            return lineage.quality
        parent = self.parent.to(self.device)
        return evaluate(parent, self._interruptible(self.images), self.stage.lmbda, self.stage.metric)[0].quality

    def _validation(self) -> Validation:
        images = tuple(name for name, _ in self.images)
        return Validation(self.val_photos.digest, images, self.stage.lmbda, self.stage.metric)
