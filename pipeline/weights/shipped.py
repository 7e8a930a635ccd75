"""Finds the file of a codec: one that the user names in any form, or one of the bundled codecs."""

import re
from pathlib import Path

from modules.saved_codec import weights_file
from pipeline.common.errors import UserError
from pipeline.common.packaged import WEIGHTS
from pipeline.weights.metadata import CheckpointError
from pipeline.weights.published import Lineage
from pipeline.weights.trained_for import trained_for

STAGE = "control"
"""The stage whose weights `hpcm compress` uses; each λ is a quality."""


def codec_file(source: Path | str) -> Path:
    """The file of a codec's weights. Raises CheckpointError if there is none.

    `source` is a file (a checkpoint, a `model.safetensors`, a `.pth.tar`), a stage's folder, a folder of
    `save_pretrained`, the name or quality of a bundled codec, or a name on the Hugging Face Hub.
    """
    if str(source).startswith("models:/"):
        raise CheckpointError(f"{source}: load it with load_registered of pipeline.tracking.mlflow_model")
    name, bundled = str(source), {path.stem: path for path in WEIGHTS.glob("*.safetensors")}
    if not Path(source).exists():
        if name in bundled:
            return bundled[name]
        if re.fullmatch(r"\d+", name, re.ASCII):
            return of_quality(int(name))
    try:
        path = weights_file(source)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    if not path.exists() and len(path.parts) == 1:
        raise CheckpointError(f"{source}: no such file or folder; the bundled codecs are {', '.join(sorted(bundled))}")
    return path


def qualities() -> list[tuple[float, Path]]:
    """λ and weights file of each quality, in order of increasing λ; quality 1 gives the smallest coded images."""
    found = []
    for path in sorted(WEIGHTS.glob("*.safetensors")):
        if Lineage.read(path).name == STAGE and (loss := trained_for(path)):
            found.append((loss.lmbda, path))
    return sorted(found)


def of_quality(quality: float | None) -> Path:
    """The weights file of a quality, 1 … N; None means the middle one. Raises UserError for any other number."""
    found = qualities()
    number = (len(found) + 1) // 2 if quality is None else quality
    if number not in range(1, len(found) + 1):
        numbers = ", ".join(f"{at} (λ = {lmbda:g})" for at, (lmbda, _) in enumerate(found, start=1))
        raise UserError(f"--quality {number:g}: there are {numbers}; use --checkpoint for other weights")
    return found[int(number) - 1][1]
