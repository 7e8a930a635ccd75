"""Texts and tables on MLflow's pages: what a stage changed, and what it achieved."""

import json
import math
from collections.abc import Sequence
from typing import Any

from modules.context.components import SLOTS
from pipeline.records.record import StageRecord


def stage_description(record: StageRecord) -> str:
    """What a stage changes in its parent's codec and, once it is published, what it achieved."""
    begin = f" It begins from `{record.parent}`." if record.parent else ""
    text = f"Stage `{record.name}` at λ = {record.lmbda:g}.{begin} {_changes(record)}"
    if record.status != "done":
        return text
    result, quality, parent = record.evaluated, record.evaluated.quality, record.evaluated.parent
    text += (
        f"\n\n{record.trained.steps:,} training steps. {result.parameters / 1e6:.2f} M parameters, "
        f"{result.kmacs_per_pixel:.1f} kMAC per pixel. Real bitstreams of the validation images: "
        f"{quality.bpp:.4f} bits per pixel, {quality.psnr_db:.2f} dB PSNR, R-D loss {quality.rd_loss:.4f}."
    )
    if parent is not None:
        text += (
            f" Relative to the parent: {quality.bpp / parent.bpp - 1:+z.2%} bits, "
            f"{quality.psnr_db - parent.psnr_db:+z.2f} dB, {quality.rd_loss - parent.rd_loss:+z.4f} R-D loss."
        )
    if result.rates:
        points = (
            f"{rate.lmbda:g}: {rate.quality.bpp:.4f} bits, {rate.quality.psnr_db:.2f} dB" for rate in result.rates
        )
        text += f" By λ: {'; '.join(points)}."
    return text  # The results are one paragraph, because MLflow's page folds a description after a few lines.


def _changes(record: StageRecord) -> str:
    before, after = record.parent_codec, record.codec
    if before is None:
        return "Root of the chain."
    replaced = [slot for slot in SLOTS if before[slot]["kind"] != after[slot]["kind"]]
    kinds = [f"`{slot}` ({before[slot]['kind']} to {after[slot]['kind']})" for slot in replaced]
    resized = [f"`{name}`" for name in after if name not in replaced and before.get(name) != after[name]]
    sentences = [f"Replaces {', '.join(kinds)}."] if kinds else []
    sentences += [f"Changes the settings of {', '.join(resized)}."] if resized else []
    return " ".join(sentences) or "Keeps the parent's codec and trains it further."


def chain_description(recipe: str, lmbda: float, stages: Sequence[StageRecord]) -> str:
    """A chain's published stages with their results, as a table in Markdown."""
    head = f"Chain of the recipe `{recipe}` at λ = {lmbda:g}. Published stages, measured with real bitstreams:"
    lines = [head, "", "| stage | coded bpp | PSNR dB | R-D loss |", "|---|---|---|---|"]
    for record in stages:
        quality = record.evaluated.quality
        lines.append(f"| {record.name} | {quality.bpp:.4f} | {quality.psnr_db:.2f} | {quality.rd_loss:.4f} |")
    return "\n".join(lines)


def stages_table(stages: Sequence[StageRecord]) -> str:
    """The results of published stages, as a table of MLflow."""
    rows = []
    for record in stages:
        result, quality, trained = record.evaluated, record.evaluated.quality, record.trained
        row = [record.name, quality.bpp, quality.psnr_db, quality.ms_ssim, quality.rd_loss, result.parameters]
        rows.append([*row, result.kmacs_per_pixel, trained.steps, trained.seconds])
    columns = ["stage", "coded bpp", "PSNR dB", "MS-SSIM", "R-D loss", "parameters", "kMAC/pixel", "steps"]
    return _table([*columns, "training s"], rows)


def images_table(record: StageRecord) -> str:
    """The results of an evaluated stage's validation images, as a table of MLflow."""
    rows = []
    for image in record.evaluated.evaluation.images:
        row = [image.name, image.quality.bpp, image.estimated_bpp, image.quality.psnr_db, image.quality.ms_ssim]
        rows.append([*row, image.encode_seconds, image.decode_seconds])
    columns = ["image", "coded bpp", "estimated bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s"]
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as `MlflowClient.log_table` stores it, rounded to four decimals, since MLflow's page shows all digits."""
    # JSON has no infinity, but the PSNR of an exact reconstruction is infinite.
    cells = [[(round(x, 4) if math.isfinite(x) else None) if isinstance(x, float) else x for x in row] for row in rows]
    return json.dumps({"columns": list(columns), "data": cells})
