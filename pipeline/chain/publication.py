"""Publishes a trained stage: its files, its record, and then one rename that puts its folder in place."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from modules import HPCM
from pipeline.chain.stage_task import StageTask
from pipeline.common import files
from pipeline.common.fault_injection import fault
from pipeline.evaluation.coding import comparison_name, plot_rate_distortion, save_comparison
from pipeline.evaluation.quality import NamedImage
from pipeline.records.record import CHECKPOINT, FILE, Result
from pipeline.records.stage_log import StageLog
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage, Quality, publish
from pipeline.weights.training_state import TrainingState


def save_pictures(folder: Path, images: Sequence[NamedImage], reconstructions: Sequence[Tensor]) -> None:
    """Write the first images beside their reconstructions, (1, 3, H, W) each."""
    shutil.rmtree(folder, ignore_errors=True)  # An attempt that was killed here may have had other images.
    for (name, image), x_hat in zip(images, reconstructions, strict=False):
        save_comparison(folder / f"{comparison_name(name)}.png", image, x_hat)


def publish_stage(task: StageTask, log: StageLog, codec: HPCM, state: TrainingState, lineage: Lineage) -> None:
    """Complete the working folder of a trained stage, and move it into its place."""
    folder, record, stage = task.states.folder, log.record, task.stage
    assert record.result is not None
    files.write_text(folder / "stage.yaml", stage.to_yaml())
    files.write_json(folder / "ledger.json", state.facts.get("ledger", []))
    files.write_json(folder / "evaluation.json", record.result.evaluation.to_json(stage.name))
    plot_rate_distortion(folder / "rate-distortion.png", _points(record.result, stage.name))
    publish(folder / CHECKPOINT, codec, lineage)
    fault("publish.checkpoint")
    task.states.forget()
    digest = read_digest(folder / CHECKPOINT)
    log.end("finished", status="done", lineage=lineage, digest=digest, files=_digests(folder))
    fault("publish.record")
    move_into_place(task)


def move_into_place(task: StageTask) -> None:
    """Supersede what is published, then publish the complete working folder with one rename."""
    working = task.states.folder
    if task.folder.exists():
        earlier = task.record_of(task.folder)
        digest = earlier.digest if earlier and earlier.digest else "damaged"
        files.free_name(task.folder.parent / "superseded" / f"{task.stage.name}-{digest[:12]}", task.folder.rename)
        fault("publish.superseded")
    working.rename(task.folder)
    files.flush(task.folder.parent)
    fault("publish.renamed")
    for folder in (working.parent, working.parent.parent):
        if not any(folder.iterdir()):
            folder.rmdir()


def _points(result: Result, name: str) -> dict[str, Quality]:
    return {**({"parent": result.parent} if result.parent else {}), name: result.quality}


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder, except the record itself."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
