"""Finds the file of a codec: one that the user names in any form, or one of the bundled codecs."""

from pathlib import Path

from modules.saved_codec import weights_file
from pipeline.common.errors import raised_as
from pipeline.common.packaged import WEIGHTS
from pipeline.weights.metadata import CheckpointError

DEFAULT = WEIGHTS / "variable.safetensors"
"""The codec that commands use unless another is given. It has every rate."""


def codec_file(source: Path | str) -> Path:
    """The file of a codec's weights. Raises CheckpointError if there is none.

    `source` is a file (a checkpoint, a `model.safetensors`, a `.pth.tar`), a stage's folder, a folder of
    `save_pretrained`, the name of a bundled codec, or a name on the Hugging Face Hub.
    """
    if str(source).startswith("models:/"):
        raise CheckpointError(f"{source}: load it with load_registered of pipeline.tracking.mlflow_model")
    name, bundled = str(source), {path.stem: path for path in WEIGHTS.glob("*.safetensors")}
    if name in bundled and not Path(source).exists():
        return bundled[name]
    with raised_as(CheckpointError, FileNotFoundError):
        path = weights_file(source)
    if not path.exists() and len(path.parts) == 1:
        raise CheckpointError(f"{source}: no such file or folder; the bundled codecs are {', '.join(sorted(bundled))}")
    return path
