"""Descriptions of runs in Markdown: what a stage changed, and what it achieved."""

from collections.abc import Mapping
from typing import Any

from modules.context.components import SLOTS
from pipeline.weights.published import PublicationRecord, Quality

NOTE = "mlflow.note.content"
"""The tag that holds the description on a run's page."""


def changes(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    """What a stage changes in its parent's codec, in sentences. Both arguments are outputs of `HPCMConfig.to_dict`."""
    if before is None:
        return "Root of the chain."
    replaced = [
        f"`{slot}` ({before[slot]['kind']} to {after[slot]['kind']})"
        for slot in SLOTS
        if before[slot]["kind"] != after[slot]["kind"]
    ]
    kept = [name for name in after if name not in SLOTS or before[name]["kind"] == after[name]["kind"]]
    resized = [f"`{name}`" for name in kept if before[name] != after[name]]
    sentences = []
    if replaced:
        sentences.append(f"Replaces {_listed(replaced)}.")
    if resized:
        sentences.append(f"Changes the settings of {_listed(resized)}.")
    return " ".join(sentences) or "Keeps the parent's codec and trains it further."


def results(quality: Quality, parent: Quality | None, parameters: int, kmacs: float, steps: int) -> str:
    """What a stage achieved, in sentences: its sizes, its quality and, if it has a parent, the difference."""
    lines = [f"{steps:,} training steps. {parameters / 1e6:.2f} M parameters, {kmacs:.1f} kMAC per pixel."]
    values = f"{quality.bpp:.4f} bits per pixel, {quality.psnr_db:.2f} dB PSNR, R-D loss {quality.rd_loss:.4f}"
    lines.append(f"Real bitstreams of the validation images: {values}.")
    if parent is not None:
        lines.append(
            f"Relative to the parent: {quality.bpp / parent.bpp - 1:+z.2%} bits, "
            f"{quality.psnr_db - parent.psnr_db:+z.2f} dB, {quality.rd_loss - parent.rd_loss:+z.4f} R-D loss."
        )
    return " ".join(lines)  # One paragraph: MLflow's page folds a description after a few lines.


def chain_description(recipe: str, lmbda: float, stages: Mapping[str, PublicationRecord]) -> str:
    """A chain's stages with their results."""
    head = f"Chain of the recipe `{recipe}` at λ = {lmbda:g}. Published stages, measured with real bitstreams:"
    rows = ["| stage | coded bpp | PSNR dB | R-D loss |", "|---|---|---|---|"]
    for name, record in stages.items():
        quality = record.quality
        rows.append(f"| {name} | {quality.bpp:.4f} | {quality.psnr_db:.2f} | {quality.rd_loss:.4f} |")
    return "\n".join([head, "", *rows])


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
