"""Runs a stage: begin, train, evaluate, accept, publish."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from modules import HPCM, HPCMConfig
from modules.loading import state_digest
from pipeline.chain.context import RunContext
from pipeline.chain.plan import Position, judge
from pipeline.chain.publication import publish_stage, save_pictures
from pipeline.chain.stage_codec import StageError, codec_config, kernel, load_fitting
from pipeline.chain.stage_task import CODE_VERSION, StageTask
from pipeline.chain.validation_images import ValidationImages
from pipeline.common.errors import Interrupted, MainProcessStopped
from pipeline.common.files import FileError
from pipeline.common.tables import shortest
from pipeline.common.timing import processor
from pipeline.data.crops import TrainingCrops
from pipeline.evaluation.multiplications import macs_per_pixel
from pipeline.recipes.schema import Transfer
from pipeline.records.chains import ChainFacts
from pipeline.records.record import DataSet, Result, StageRecord, Start
from pipeline.records.source import source_of
from pipeline.records.stage_log import StageLog
from pipeline.training.narrowing import Site, start_child
from pipeline.training.reporting import Reporting
from pipeline.training.trainer import Trainer
from pipeline.training.transfer import Ledger, Migration, Origin, ledger_of, transfer_weights
from pipeline.weights.checkpoints import codec_tensors, load_codec
from pipeline.weights.metadata import read_metadata
from pipeline.weights.published import Lineage, Quality
from pipeline.weights.training_state import Progress, StateFolder, TrainingState


def run_stage(task: StageTask, context: RunContext, chain: ChainFacts) -> None:
    """Begin or resume a stage, train and evaluate it, and publish the result if it is accepted.

    Raises StageError if it is not, and the errors of training. The last saved state is kept.
    """
    on_main_process = context.processes.on_main_process
    stage = StageRun(task, context)
    stage.begin(chain)
    with stage.noting_the_end():
        with context.sample(stage.folder) if context.processes.is_main else nullcontext():
            codec = stage.train()
            on_main_process(lambda: stage.evaluate(codec))
        on_main_process(stage.accept)
        on_main_process(lambda: stage.publish(codec))


class StageRun:
    """One attempt at a stage. It continues where the previous attempt stopped. Its steps are methods, in order."""

    log: StageLog

    def __init__(self, task: StageTask, context: RunContext):
        self.task, self.stage, self.context = task, task.stage, context
        self.processes, self.watcher = context.processes, context.watcher
        self.device = context.processes.accelerator.device
        self.inputs = task.inputs()
        self.folder = task.working(self.inputs)
        self.states = StateFolder(self.folder)
        self.state, self._unreadable = self.states.newest()
        self.validation = ValidationImages(task, context)

    def begin(self, chain: ChainFacts) -> None:
        """Begin an attempt in the record, and cut the metrics to the state from which it continues."""
        self.processes.agree_on(self._state_facts)  # All have read the states before the first process saves one.
        for line in self._unreadable:
            self.watcher.note(line)
        how, progress = "started", self.state.progress if self.state else Progress()
        if progress.stage_step or progress.segment:
            position = Position(progress.segment, progress.step, progress.stage_step)
            how = f"resumed in {position.named(self.stage.schedule)}"
            self.watcher.note(how)
        environment = {  # What affects rounding: the result can be the same bit for bit only if all of it is equal.
            "PyTorch": torch.__version__,
            "device": processor(str(self.device)),
            "threads": str(torch.get_num_threads()),
            "processes": str(self.processes.accelerator.num_processes),
            "Bi-WKV4": kernel(self.task, self.device),
            "micro-batches": str(self.stage.data.accumulate),
        }
        folder = self.folder if self.processes.is_main else None
        self.log = StageLog.begin(folder, self._record(chain), how, source_of(self.device, environment))
        self.log.metrics.cut(progress.lines)
        self.log.saved(progress, segments=self.log.record.segments[: progress.segment], result=None)
        attempts = self.log.record.attempts
        before = attempts[-2].source.environment if self.state and len(attempts) > 1 else environment
        for name, value in before.items():
            if environment.get(name) != value:
                self.watcher.note(
                    f"{name}: {value} before, {environment.get(name)} now; the result will be as good as that of an "
                    "uninterrupted run, but not bit for bit the same"
                )

    def _state_facts(self) -> dict[str, str]:
        """The state from which the training continues, for a comparison of processes."""
        if self.state is None:
            return {"training state": "none"}
        return {"training state": f"step {self.state.progress.stage_step} ({state_digest(self.state.model)[:16]})"}

    def _record(self, chain: ChainFacts) -> StageRecord:
        """The record of a training that begins."""
        parent = read_metadata(self.task.parent)["config"] if self.task.parent else None
        return StageRecord(
            key=uuid.uuid4().hex,
            recipe=chain.recipe,
            lmbda=chain.lmbda,
            seed=chain.seed,
            name=self.stage.name,
            parent=self.stage.parent,
            status="training",
            lineage=Lineage(
                self.stage.name, self.stage.to_yaml(), self.stage.lmbda, self.stage.metric, CODE_VERSION, self.inputs
            ),
            codec=codec_config(self.task).to_dict(),
            parent_codec=HPCMConfig.from_dict(parent).to_dict() if parent else None,
            train_images=DataSet.of(self.task.train_photos),
            val_images=DataSet.of(self.task.val_photos),
        )

    def train(self) -> HPCM:
        """The child after its schedule, or the imported codec, in evaluation mode."""
        codec = self._train() if self.task.imported is None else self._codec_of(self.task.imported)
        return codec.to(self.device).eval().requires_grad_(False)

    def _train(self) -> HPCM:
        seed = int(np.random.SeedSequence([self.stage.seed, *self.stage.name.encode()]).generate_state(1)[0])
        torch.manual_seed(seed)
        child = HPCM(codec_config(self.task))
        if child.rate_vectors is not None:
            child.rate_vectors.start_from(self.stage.lmbda)
        crops = TrainingCrops(self.task.train_photos, self.stage.data.crop, seed)
        if self.state is None:
            self.state, ledger = self._transfer(child, crops)
        else:
            ledger = Ledger.read(self.folder)
        counts = ", ".join(f"{count} {origin}" for origin, count in sorted(ledger.counts().items()))
        self.watcher.note(f"transfer: {counts}")
        start = self.log.record.start
        if start.step0 is not None and start.step0_gap is not None:
            self.watcher.note(
                f"step 0: estimated validation loss {start.step0.rd_loss:.4f}, "
                f"{start.step0_gap:+z.4f} relative to the parent"
            )
        migration = Migration(child, self.parent, ledger.new)
        measure = partial(self.validation.estimate, child)
        reporting = Reporting(self.log.metrics, self.watcher, measure, self.log.saved, self.log.segment_ended)
        Trainer(self.stage, migration, crops, self.processes, self.states, reporting).train(self.state)
        return child

    def _transfer(self, child: HPCM, crops: TrainingCrops) -> tuple[TrainingState, Ledger]:
        """Transfer weights, and compare child and parent before the first step."""
        child.to(self.device)
        solved: dict[Origin, list[Site]] = {}
        if self.task.start is not None:
            ledger = transfer_weights(self._codec_of(self.task.start).to(self.device), child, Transfer())
        elif self.parent is None:
            ledger = ledger_of(None, child, {}, {})
        else:
            ledger, solved = start_child(self.parent.to(self.device), child, self.stage.transfer, crops)
        for what, sites in solved.items():
            if sites:
                modules, worst = f"{len(sites)} module{'s' if len(sites) > 1 else ''}", max(s.error for s in sites)
                self.watcher.note(f"{what} {modules}: at most {worst:.1%} of the variance unexplained")
        state = TrainingState(Progress(), codec_tensors(child))

        def compare_and_save() -> None:
            start = Start(tensors=ledger.counts())
            if self.parent is not None:
                before, after = self.validation.estimate(self.parent), self.validation.estimate(child)
                gap = after.rd_loss - before.rd_loss
                start = replace(start, parent=before, step0=after, step0_gap=gap)
                self.log.metrics.append(before.metrics("val/parent"), 0)
                self.log.metrics.append({**after.metrics("val"), "val/step0_gap": gap}, 0)
            ledger.write(self.folder)
            progress = replace(state.progress, lines=self.log.metrics.lines)
            self.log.update(start=start)
            self.states.save(replace(state, progress=progress))
            self.log.saved(progress)

        self.processes.on_main_process(compare_and_save)
        return state, ledger

    def _codec_of(self, file: Path) -> HPCM:
        """The codec of the root's file. The lineage records which vectors the file lacked."""
        codec = load_fitting(self.task, file)
        if codec.filled_with_ones:
            lineage = self.log.record.lineage
            self.log.update(lineage=replace(lineage, imported_from=file.name, filled_with_ones=codec.filled_with_ones))
        return codec

    @cached_property
    def parent(self) -> HPCM | None:
        """The parent's codec; None for a root."""
        return load_codec(self.task.parent) if self.task.parent else None

    def evaluate(self, codec: HPCM) -> None:
        """Code the validation images with real bitstreams, and judge the result. Only the first process calls this."""
        evaluation, reconstructions = self.validation.evaluate(codec, self.stage.evaluation.reconstructions)
        quality, parent = evaluation.quality, self._parent_quality()
        change = f", {quality.rd_loss - parent.rd_loss:+z.4f} relative to the parent" if parent else ""
        self.watcher.note(
            f"result: {quality.bpp:.4f} coded bpp, {quality.psnr_db:.2f} dB, R-D loss {quality.rd_loss:.4f}{change}"
        )
        rates = tuple(self.validation.at_each_rate(codec, quality))
        reasons = judge(self.stage.accept, quality, parent)
        verdict = "accepted" if not reasons else "accepted anyway" if self.context.accept_anyway else "refused"
        parameters, kmacs = sum(p.numel() for p in codec.parameters()), macs_per_pixel(codec.config) / 1000
        self.log.update(result=Result(evaluation, parent, verdict, tuple(reasons), parameters, kmacs, rates))
        save_pictures(self.folder / "reconstructions", self.validation.images, reconstructions)

    def _parent_quality(self) -> Quality | None:
        """The parent's quality on the child's validation images; None for a root."""
        if self.parent is None or self.task.parent is None:
            return None
        lineage = Lineage.read(self.task.parent)
        if lineage.quality is not None and lineage.validation == self.validation.conditions:
            return lineage.quality
        return self.validation.evaluate(self.parent.to(self.device))[0].quality

    def accept(self) -> None:
        """Raise StageError if the result exceeds the stage's limits."""
        result = self.log.record.evaluated
        if result.verdict == "refused":
            self.log.update(status="refused")
            raise StageError(
                f"{self.stage.name}: not accepted, compared with its parent: {'; '.join(result.reasons)}.\n"
                "  The trained state is kept. Relax `accept` in the recipe (or with --set "
                f"{self.stage.name}.accept.…=), or publish the result with --accept-anyway. "
                "A longer schedule trains the stage again from its parent."
            )

    def publish(self, codec: HPCM) -> None:
        """Complete the stage's folder, and move it into its place."""
        result, step = self.log.record.evaluated, self.log.record.trained.steps
        self.log.metrics.append(result.quality.metrics("final"), step)
        sizes = {"model/parameters": result.parameters, "model/kmacs_per_pixel": result.kmacs_per_pixel}
        self.log.metrics.append(sizes, step)
        for rate in result.rates:
            self.log.metrics.append(rate.quality.metrics(f"final/lmbda-{shortest(rate.lmbda)}"), step)
        lineage = replace(self.log.record.lineage, quality=result.quality, validation=self.validation.conditions)
        publish_stage(self.task, self.folder, self.log, codec, lineage)

    @contextmanager
    def noting_the_end(self) -> Iterator[None]:
        """Record the error that ends the attempt."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt | MainProcessStopped)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if self.log.record.status != "done":  # A complete folder may have been moved already.
                with suppress(FileError):
                    self.log.end("interrupted" if stopped else "failed", reason)
            raise
