"""Publishes a trained stage: its files, its entries in MLflow, and last the record that marks it as done."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modules import HPCM
from pipeline.chain.stage_task import CODE_VERSION, StageTask
from pipeline.common import files
from pipeline.common.contracts import contract_of
from pipeline.common.fault_injection import fault
from pipeline.evaluation.coding import macs_per_pixel
from pipeline.evaluation.results import Evaluation
from pipeline.tracking.descriptions import NOTE, results
from pipeline.tracking.published_stage import PublishedStage, log_published
from pipeline.tracking.store import Run
from pipeline.tracking.tags import ChainTags, StageTags
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage, PublicationRecord, Quality, StartFacts, Validation, publish
from pipeline.weights.training_state import TrainingState

LOGGED = ("stage.yaml", "ledger.json", "evaluation.json", "rate-distortion.png", "checkpoint.safetensors")
"""Files of a stage's folder that MLflow keeps as artifacts, besides the reconstructions."""


@dataclass(frozen=True)
class Publication:
    """A trained codec, what it achieves, and what is said about it."""

    task: StageTask
    inputs: dict[str, str]
    """Digests of the inputs of the training."""
    codec: HPCM
    state: TrainingState
    """The training's last state."""
    evaluation: Evaluation
    validation: Validation
    parent_quality: Quality | None
    description: str
    """What the stage changes, for the page of its run."""

    @property
    def parameters(self) -> int:
        """The number of the codec's parameters."""
        return sum(parameter.numel() for parameter in self.codec.parameters())

    @cached_property
    def kmacs(self) -> float:
        """Thousands of multiplications per pixel."""
        return macs_per_pixel(self.task.config) / 1000

    def write(self, run: Run, runs: Path) -> None:
        """Write the stage's files, log them to its run, and write its record. `runs` is the folder of runs."""
        task, folder, stage = self.task, self.task.folder, self.task.stage
        files.write_text(folder / "stage.yaml", stage.to_yaml())
        files.write_json(folder / "ledger.json", self.state.facts.get("ledger", []))
        files.write_json(folder / "evaluation.json", self.evaluation.to_json(stage.name))
        lineage = Lineage(
            name=stage.name,
            stage=stage.to_yaml(),
            code=CODE_VERSION,
            inputs=self.inputs,
            quality=self.evaluation.quality,
            validation=self.validation,
        )
        publish(task.checkpoint, self.codec, lineage)
        fault("publish.checkpoint")
        digest = read_digest(task.checkpoint)
        self._log(run, digest, task.checkpoint.relative_to(runs).as_posix())
        # Last: a stage with a record counts as done.
        self._record(run.key, digest).write(task.record)
        fault("publish.record")

    def _log(self, run: Run, digest: str, checkpoint: str) -> None:
        folder, quality, step = self.task.folder, self.evaluation.quality, self.state.progress.stage_step
        run.metrics(quality.metrics("final"), step)
        run.metrics({"model/parameters": self.parameters, "model/kmacs_per_pixel": self.kmacs}, step)
        run.tags(StageTags(checkpoint=checkpoint, checkpoint_digest=digest).to_tags())
        for name in LOGGED:
            run.artifact(folder / name)
        if (folder / "reconstructions").is_dir():
            run.artifact(folder / "reconstructions", "reconstructions")
        achieved = results(quality, self.parent_quality, self.parameters, self.kmacs, step)
        run.tags({NOTE: f"{self.description}\n\n{achieved}"})
        log_published(run, self._published(digest))
        run.end("FINISHED")

    def _published(self, digest: str) -> PublishedStage:
        stage = self.task.stage
        return PublishedStage(
            name=stage.name,
            folder=self.task.folder,
            preset=stage.model.preset,
            chain=ChainTags(self.task.folder.parents[1].name, stage.lmbda, stage.seed),
            digest=digest,
            inputs=self.inputs,
            evaluation=self.evaluation,
            validation=self.validation,
            data_name=self.task.val_photos.name,
            step=self.state.progress.stage_step,
        )

    def _record(self, key: str | None, digest: str) -> PublicationRecord:
        progress = self.state.progress
        return PublicationRecord(
            digest=digest,
            inputs=self.inputs,
            mlflow_key=key,
            parameters=self.parameters,
            kmacs_per_pixel=self.kmacs,
            quality=self.evaluation.quality,
            training_seconds=progress.seconds,
            steps=progress.stage_step,
            skipped_steps=progress.bad_steps,
            facts=contract_of(StartFacts, self.state.facts, "training state"),
        )
