"""Chains made from numbers, without training."""

from dataclasses import replace
from pathlib import Path

from pipeline.evaluation.results import Evaluation, ImageResult
from pipeline.records.chains import ChainRecord, StoredStage
from pipeline.records.comparison import Comparison, Cost, Size
from pipeline.records.record import DataSet, Result, StageRecord
from pipeline.weights.published import Lineage, Quality, Validation

IMAGES = DataSet("photos", "/photos", "0" * 64, 1, 1000)
SETTINGS = """
model: {preset: tiny}
data: {batch_size: 2, crop: 128}
schedule: [{name: unfrozen, steps: 10, handover: 0, lr: {default: 0.001}}]
"""


def stage(
    name: str, lmbda: float, bpp: float, psnr_db: float, parent: str | None = "baseline", kmacs: float = 1.0
) -> StoredStage:
    """A published stage of 10 steps with this quality, and the loss that follows from it."""
    loss = bpp + lmbda * 255**2 * 10 ** (-psnr_db / 10)
    quality = Quality(bpp, psnr_db, None, loss)
    validation = Validation("0" * 64, ("a.png",), lmbda, "mse")
    lineage = Lineage(name, SETTINGS, inputs={"recipe": "1"}, quality=quality, validation=validation)
    attention = "cross-attention" if name.startswith(("baseline", "control")) else "rwkv"
    codec = {"attn_s3": {"kind": attention}}
    result = Result(Evaluation((ImageResult("a.png", quality, bpp, 0.1, 0.1),)), None, "accepted", (), 10, kmacs)
    record = StageRecord(
        f"key of {name}", "made", lmbda, 0, name, parent, "done", lineage, codec, None, IMAGES, IMAGES, result=result
    )  # fmt: skip
    return StoredStage(Path(name), "published", record)


def chain(lmbda: float, seed: int, *stages: StoredStage) -> ChainRecord:
    """A chain of made stages."""
    return ChainRecord("key", "made", lmbda, seed, Path(f"{lmbda}-{seed}"), stages)


def changed(stage: StoredStage, **fields: object) -> StoredStage:
    """The stage with other fields in its record."""
    return replace(stage, record=replace(stage.record, **fields))


def costs(ratio: float) -> Comparison:
    """A comparison in which Phase 4 takes this many times the Baseline's time, and half its memory."""
    measured = [
        Cost(codec, "512×768", activity, (factor, 2 * factor, 4 * factor), size)
        for codec, factor, size in (("baseline", 1.0, 200 * 2**20), ("phase4", ratio, 100 * 2**20))
        for activity in ("encode", "decode", "unfrozen")
    ]
    sizes = Size("baseline", 10, 1.0), Size("phase4", 20, 2.0)
    return Comparison("mini", "cpu", "a machine", "2", 3, False, 0, sizes, tuple(measured))
