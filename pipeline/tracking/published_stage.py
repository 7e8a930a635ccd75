"""Logs a published stage to MLflow, in addition to its metrics and files: pictures, tables and a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.tables import shortest
from pipeline.evaluation.results import Evaluation
from pipeline.tracking import descriptions
from pipeline.tracking.mlflow_model import save_mlflow_model
from pipeline.tracking.model_facts import ModelFacts
from pipeline.tracking.store import Run
from pipeline.tracking.tags import ChainTags
from pipeline.weights.published import PublicationRecord, Validation


@dataclass(frozen=True)
class PublishedStage:
    """The facts about a published stage that are logged to MLflow."""

    name: str
    folder: Path
    preset: str
    chain: ChainTags
    digest: str
    inputs: Mapping[str, str]
    evaluation: Evaluation
    validation: Validation
    data_name: str
    """Name of the validation images."""
    step: int


def log_published(run: Run, stage: PublishedStage) -> None:
    """Log the reconstructions beside their originals, the results of each validation image, and the model.

    The final metrics must be logged first.
    """
    for picture in sorted((stage.folder / "reconstructions").glob("*.png")):
        run.image(picture, f"reconstructions/{_safe(picture.stem)}", stage.step)
    columns = ["image", "coded bpp", "estimated bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s"]
    rows = [
        [
            image.name, image.quality.bpp, image.estimated_bpp, image.quality.psnr_db, image.quality.ms_ssim,
            image.encode_seconds, image.decode_seconds,
        ]
        for image in stage.evaluation.images
    ]  # fmt: skip
    run.table("images.json", columns, _rounded(rows))
    _register(run, stage)


def _register(run: Run, stage: PublishedStage) -> None:
    quality, chain = stage.evaluation.quality, stage.chain
    lineage = {**chain.to_tags(), **{f"hpcm.input.{name.replace(' ', '_')}": d for name, d in stage.inputs.items()}}
    facts = ModelFacts(
        registered=f"hpcm-{stage.preset}-lmbda-{shortest(chain.lmbda)}",
        stage=stage.name,
        digest=stage.digest,
        metrics=quality.metrics("final"),
        step=stage.step,
        loss=quality.rd_loss,
        dataset=stage.data_name,
        dataset_digest=stage.validation.digest[:36],
        lineage=lineage,
    )
    checkpoint = stage.folder / "checkpoint.safetensors"
    run.model(facts, lambda folder: save_mlflow_model(checkpoint, folder))


def log_chain(run: Run, chain: ChainTags, records: Mapping[str, PublicationRecord]) -> None:
    """Log the results of all stages to the chain's run: metrics by stage, a table, and a description."""
    columns = [
        "stage",
        "coded bpp",
        "PSNR dB",
        "MS-SSIM",
        "R-D loss",
        "parameters",
        "kMAC/pixel",
        "steps",
        "training s",
    ]
    rows = []
    for name, record in records.items():
        quality = record.quality
        run.results({f"{name}/{key.removeprefix('final/')}": v for key, v in quality.metrics("final").items()})
        rows.append(
            [
                name, quality.bpp, quality.psnr_db, quality.ms_ssim, quality.rd_loss, record.parameters,
                record.kmacs_per_pixel, record.steps, record.training_seconds,
            ]
        )  # fmt: skip
    if rows:
        run.table("stages.json", columns, _rounded(rows))
        run.tags({descriptions.NOTE: descriptions.chain_description(chain.recipe, chain.lmbda, records)})


def _rounded(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The rows with four decimals, which MLflow's page shows as they are; the metrics have all digits."""
    return [[round(value, 4) if isinstance(value, float) else value for value in row] for row in rows]


def _safe(name: str) -> str:
    """The name, with `_` for each character that MLflow does not allow in a picture's key."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-. ") else "_" for c in name)
