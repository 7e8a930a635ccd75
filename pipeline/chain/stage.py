"""Runs a stage: begin, train, evaluate, accept, publish."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from modules import HPCM, HPCMConfig
from pipeline.chain.acceptance import judge
from pipeline.chain.context import RunContext
from pipeline.chain.precheck import StageError
from pipeline.chain.publication import move_into_place, publish_stage, save_pictures
from pipeline.chain.stage_task import CODE_VERSION, StageTask
from pipeline.common.errors import Interrupted, MainProcessStopped
from pipeline.common.fault_injection import fault
from pipeline.common.files import FileError
from pipeline.common.processes import environment_of
from pipeline.data.crops import TrainingCrops, validation_images
from pipeline.data.images import DataError, Photos, find_images
from pipeline.evaluation.coding import estimate, evaluate, macs_per_pixel
from pipeline.evaluation.limits import check_size
from pipeline.evaluation.quality import NamedImage
from pipeline.recipes.schema import Segment, Transfer
from pipeline.records import record as records
from pipeline.records.chains import ChainFacts
from pipeline.records.record import DataSet, Result, SegmentResult, StageRecord, Trained
from pipeline.records.source import source_of
from pipeline.records.stage_log import StageLog, fresh_key
from pipeline.training.initial_weights import Start, start_child
from pipeline.training.reporting import Migration, Reporting
from pipeline.training.trainer import Trainer
from pipeline.training.transfer import Ledger, new_components, transfer_weights
from pipeline.weights import checkpoints
from pipeline.weights.checkpoints import CheckpointError, codec_tensors
from pipeline.weights.metadata import read_metadata
from pipeline.weights.published import Lineage, Quality, Validation
from pipeline.weights.training_state import Progress, TrainingState


class StageRun:
    """One attempt at a stage. It continues where the previous attempt stopped."""

    def __init__(self, task: StageTask, context: RunContext, chain: ChainFacts):
        self.task, self.context, self.chain = task, context, chain
        self.stage = task.stage
        self.inputs = task.inputs()
        self.train_photos, self.val_photos = task.train_photos, task.val_photos
        self.states = task.states
        self.processes, self.watcher = context.processes, context.watcher
        self.device = context.processes.accelerator.device

    def run(self) -> None:
        """Begin, train, evaluate, accept, publish."""
        record = self.task.record_of(self.states.folder)
        if record is not None and record.status == "done":  # The last attempt was killed while it published.
            self.processes.on_main_process(lambda: move_into_place(self.task))
            return
        state, passed_over = self.states.newest()
        self.log = self._begin(state)
        for line in passed_over:
            self.watcher.note(line)
        try:
            with self._sampling():
                child, state = self._import_file() if self.task.imported else self._train(state)
                child = child.to(self.device).eval().requires_grad_(False)
                self.processes.on_main_process(lambda: self._evaluate(child))
            self.processes.on_main_process(lambda: self._publish(child, state))
        except BaseException as error:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt | MainProcessStopped)
            with suppress(FileError):
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self.log.end("interrupted" if stopped else "failed", reason)
            raise

    def _begin(self, state: TrainingState | None) -> StageLog:
        """Begin an attempt in the record, and cut the metrics to the state from which it continues."""
        for photos in (self.train_photos, self.val_photos):
            for path, reason in photos.skipped:
                self.watcher.note(f"skipped {path}: {reason}")
        how, progress = "started", state.progress if state else Progress()
        if progress.stage_step or progress.segment:
            how = f"resumed in {self.task.position(progress)}"
            self.watcher.note(how)
        folder = self.states.folder if self.context.is_main else None
        log = StageLog.begin(folder, self._record(), how, source_of(self.device))
        log.metrics.cut(progress.lines)
        log.update(segments=log.record.segments[: progress.segment], result=None)
        return log

    def _record(self) -> StageRecord:
        """The record of a training that begins."""
        parent = read_metadata(self.task.parent)["config"] if self.task.parent else None
        return StageRecord(
            key=fresh_key(),
            recipe=self.chain.recipe,
            lmbda=self.chain.lmbda,
            seed=self.chain.seed,
            name=self.stage.name,
            parent=self.stage.parent,
            status="training",
            lineage=Lineage(name=self.stage.name, stage=self.stage.to_yaml(), code=CODE_VERSION, inputs=self.inputs),
            codec=self.task.config.to_dict(),
            parent_codec=HPCMConfig.from_dict(parent).to_dict() if parent else None,
            train_images=_data_set(self.train_photos),
            val_images=_data_set(self.val_photos),
        )

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        with self.context.sample(self.states.folder) if self.context.is_main else nullcontext():
            yield

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
                self.watcher.note(f"left out of validation: {name}: {error}")
        folder = self.stage.data.val
        if folder and find_images(Path(folder), "val", 1, self.task.runs).digest != self.val_photos.digest:
            raise DataError(
                f"{self.val_photos.source}: the validation images changed during the run; run the same command again"
            )
        if not found:
            raise DataError(f"{self.val_photos.source}: all images are too large for validation; give smaller ones")
        return found

    def _import_file(self) -> tuple[HPCM, TrainingState]:
        assert self.task.imported is not None
        return self._import(self.task.imported), TrainingState(Progress(), {}, {}, {})

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

    def _train(self, state: TrainingState | None) -> tuple[HPCM, TrainingState]:
        seed = int(np.random.SeedSequence([self.stage.seed, *self.stage.name.encode()]).generate_state(1)[0])
        torch.manual_seed(seed)
        child = HPCM(self.task.config)
        crops = TrainingCrops(self.train_photos, self.stage.data.crop, seed)
        components = tuple(new_components(self.parent, child)) if self.parent else ()
        if state is None:
            state = self._transfer(child, crops)
        ledger = Ledger.from_json(state.facts["ledger"])
        self._note_start(state, ledger)
        self._note_environment(state)
        reporting = Reporting(
            self.log.metrics,
            self.watcher,
            measure=lambda: self._estimate(child),
            saved=self._saved,
            segment_ended=self._segment_ended,
        )
        migration = Migration(child, self.parent, components, ledger.new)
        trainer = Trainer(self.stage, migration, crops, self.processes, reporting)
        return child, trainer.train(self.states, state)

    def _transfer(self, child: HPCM, crops: TrainingCrops) -> TrainingState:
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
            first = records.Start(tensors=start.ledger.counts())
            if self.parent is not None:
                before, after = self._estimate(self.parent), self._estimate(child)
                gap = after.rd_loss - before.rd_loss
                first = replace(first, parent=before, step0=after, step0_gap=gap)
                self.log.metrics.append(before.metrics("val/parent"), 0)
                self.log.metrics.append({**after.metrics("val"), "val/step0_gap": gap}, 0)
            self.log.update(start=first)
            progress = replace(state.progress, lines=self.log.metrics.lines)
            self.states.save(replace(state, progress=progress))
            self._saved(progress)

        self.processes.on_main_process(compare_and_save)
        return state

    def _saved(self, progress: Progress) -> None:
        """Note in the record how far the training has come."""
        self.log.update(
            trained=Trained(
                progress.stage_step, progress.bad_steps, progress.exploded_steps, progress.seconds, progress.lines
            )
        )

    def _segment_ended(self, segment: Segment, progress: Progress, quality: Quality) -> None:
        before = sum(result.seconds for result in self.log.record.segments)
        result = SegmentResult(segment.name, segment.steps, progress.seconds - before, quality)
        self.log.update(segments=(*self.log.record.segments[: progress.segment], result))

    def _note_start(self, state: TrainingState, ledger: Ledger) -> None:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(ledger.counts().items()))
        self.watcher.note(f"transfer: {counts}")
        for what in ("narrowed", "fitted"):
            if errors := [site["error"] for site in state.facts.get(what, ())]:
                modules = f"{len(errors)} module{'s' if len(errors) > 1 else ''}"
                self.watcher.note(f"{what} {modules}: at most {max(errors):.1%} of the variance unexplained")
        start = self.log.record.start
        if start.step0 is not None and start.step0_gap is not None:
            self.watcher.note(
                f"step 0: estimated validation loss {start.step0.rd_loss:.4f}, "
                f"{start.step0_gap:+z.4f} relative to the parent"
            )

    def _note_environment(self, state: TrainingState) -> None:
        """Record the environment, and report changes since the last state that can change the trained bytes."""
        now = {**environment_of(self.processes.accelerator), "Bi-WKV4": self.task.kernel(self.device)}
        now["micro-batches"] = str(self.stage.data.accumulate)
        for name, before in state.facts.get("environment", now).items():
            if now.get(name) != before:
                self.watcher.note(
                    f"{name}: {before} before, {now.get(name)} now; the result will be as good as that of an "
                    "uninterrupted run, but not bit for bit the same"
                )
        state.facts["environment"] = now

    def _estimate(self, model: HPCM) -> Quality:
        return estimate(model, self._interruptible(self.images), self.stage.lmbda, self.stage.metric)

    def _interruptible(self, images: list[NamedImage]) -> Iterator[NamedImage]:
        """Yields the images. A signal stops the work between two images."""
        for done, image in enumerate(images):
            self.processes.stop_if_asked()
            fault("evaluation")
            self.watcher.image(done, len(images))
            yield image
        self.processes.stop_if_asked()

    def _evaluate(self, child: HPCM) -> None:
        """Code the validation images with real bitstreams. Raises StageError if the limits are exceeded."""
        kept = self.stage.evaluation.reconstructions
        images = self._interruptible(self.images)
        evaluation, reconstructions = evaluate(child, images, self.stage.lmbda, self.stage.metric, kept)
        quality, parent = evaluation.quality, self._parent_quality()
        reasons = judge(self.stage.accept, quality, parent)
        verdict = "accepted" if not reasons else "accepted anyway" if self.context.accept_anyway else "refused"
        parameters, kmacs = sum(p.numel() for p in child.parameters()), macs_per_pixel(self.task.config) / 1000
        change = f", {quality.rd_loss - parent.rd_loss:+z.4f} relative to the parent" if parent else ""
        self.watcher.note(
            f"result: {quality.bpp:.4f} coded bpp, {quality.psnr_db:.2f} dB, R-D loss {quality.rd_loss:.4f}{change}"
        )
        result = Result(evaluation, parent, verdict, tuple(reasons), parameters, kmacs)
        if verdict == "refused":
            self.log.update(result=result, status="refused")
            raise StageError(
                f"{self.stage.name}: not accepted, compared with its parent: {'; '.join(reasons)}.\n"
                "  The trained state is kept. Relax `accept` in the recipe (or with --set "
                f"{self.stage.name}.accept.…=), or publish the result with --accept-anyway. "
                "A longer schedule trains the stage again from its parent."
            )
        step = self.log.record.trained.steps
        self.log.metrics.append(quality.metrics("final"), step)
        self.log.metrics.append({"model/parameters": parameters, "model/kmacs_per_pixel": kmacs}, step)
        self.log.update(result=result)
        save_pictures(self.states.folder / "reconstructions", self.images, reconstructions)

    def _publish(self, child: HPCM, state: TrainingState) -> None:
        assert self.log.record.result is not None
        quality = self.log.record.result.quality
        lineage = replace(self.log.record.lineage, quality=quality, validation=self._validation())
        publish_stage(self.task, self.log, child, state, lineage)

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


def _data_set(photos: Photos) -> DataSet:
    return DataSet(photos.name, photos.source, photos.digest, len(photos.paths), photos.pixels)
