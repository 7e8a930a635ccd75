"""Publishes a trained stage: its files, its record, and then one rename that puts its folder in place."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from modules import HPCM
from pipeline.chain.stage_task import StageTask, record_in
from pipeline.common import files
from pipeline.common.fault_injection import fault
from pipeline.common.figure_style import save
from pipeline.evaluation.coding import comparison_name, save_comparison
from pipeline.evaluation.metrics import NamedImage
from pipeline.evaluation.rd_curves import draw_curves
from pipeline.records.record import CHECKPOINT, FILE
from pipeline.records.stage_log import StageLog
from pipeline.weights.checkpoints import publish
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage
from pipeline.weights.training_state import STATES, StateFolder


def save_pictures(folder: Path, images: Sequence[NamedImage], reconstructions: Sequence[Tensor]) -> None:
    """Write the first images beside their reconstructions, (1, 3, H, W) each."""
    shutil.rmtree(folder, ignore_errors=True)  # An attempt that was killed here may have had other images.
    for (name, image), x_hat in zip(images, reconstructions, strict=False):
        save_comparison(folder / f"{comparison_name(name)}.png", image, x_hat)


def publish_stage(task: StageTask, folder: Path, log: StageLog, codec: HPCM, lineage: Lineage) -> None:
    """Complete the working folder of a trained stage, and move it into its place. Raises FileError.

    A kill loses nothing: once the record says `done`, the next run moves the folder.
    """
    result, stage = log.record.evaluated, task.stage
    files.write_text(folder / "stage.yaml", stage.to_yaml())
    files.write_json(folder / "evaluation.json", result.evaluation.to_json(stage.name))
    ours = [rate.quality for rate in result.rates] or [result.quality]
    points = {**({"parent": [result.parent]} if result.parent else {}), stage.name: ours}
    curves = {name: (found, {"marker": "o"}) for name, found in points.items()}  # A single point has no line.
    save(draw_curves(curves, False, "coded rate in bits per pixel", columns=2), folder / "rate-distortion.png")
    publish(folder / CHECKPOINT, codec, lineage)
    fault("publish.checkpoint")
    left_out = {folder / FILE, *folder.glob(STATES), *folder.glob("*.partial")}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in left_out)
    digests = {path.relative_to(folder).as_posix(): files.file_digest(path) for path in paths}
    log.end("finished", status="done", lineage=lineage, digest=read_digest(folder / CHECKPOINT), files=digests)
    fault("publish.record")
    move_into_place(folder, task)


def move_into_place(folder: Path, task: StageTask) -> None:
    """Supersede what is published, then publish a complete folder with one rename."""
    StateFolder(folder).forget()
    if task.folder.exists():
        earlier = record_in(task.folder)
        digest = earlier.digest if earlier and earlier.digest else "damaged"
        superseded = task.chain_folder / "superseded" / f"{task.stage.name}-{digest[:12]}"
        files.free_name(superseded, task.folder.rename)
        fault("publish.superseded")
    folder.rename(task.folder)
    files.flush(task.chain_folder)
    fault("publish.renamed")
    for parent in (folder.parent, folder.parents[1]):
        if parent != task.chain_folder and not any(parent.iterdir()):
            parent.rmdir()
