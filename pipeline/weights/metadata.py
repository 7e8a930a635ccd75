"""Reads a checkpoint's metadata without its tensors, and without PyTorch, which takes seconds to import."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.common.errors import UserError
from pipeline.common.files import check_regular, text_digest
from pipeline.common.memory import too_large

FORMAT = "hpcm-checkpoint-2"
METADATA_KEY = "hpcm"


class CheckpointError(UserError):
    """A file is not a usable checkpoint. The message names the file and tensor and says what to do."""


def is_official(path: Path) -> bool:
    """Whether a path is named like the official checkpoints, `.pth.tar`, rather than like those of this pipeline."""
    return path.suffix in (".tar", ".pth", ".pt")


def check_file(path: Path) -> None:
    """Raise CheckpointError unless the file exists and fits into memory."""
    size = check_regular(path, CheckpointError).st_size
    if reason := too_large(size):
        raise CheckpointError(f"{path}: {size:,} bytes: loading it {reason}")


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata only; raises CheckpointError for a file that `checkpoints.write` did not write."""
    check_file(path)
    if is_official(path):
        raise CheckpointError(
            f"{path}: an official checkpoint; first convert it: hpcm import {path} baseline.safetensors"
        )
    try:
        with safe_open(path, "numpy") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this pipeline; "
            f"import official weights with `hpcm import {path} baseline.safetensors`"
        )
    if metadata.pop("seal", None) != seal(metadata):
        raise CheckpointError(f"{path}: the metadata does not match its digest; the file is damaged")
    return metadata


def read_digest(path: Path) -> str:
    """The digest of the weights that a file's metadata states; raises CheckpointError as `read_metadata` does."""
    return str(read_metadata(path)["digest"])


def seal(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of all metadata except the seal, in hexadecimal."""
    return text_digest(json.dumps(metadata, sort_keys=True))


def inputs_digest(inputs: Mapping[str, str]) -> str:
    """Sixteen hexadecimal digits of a SHA-256 of the digests of a stage's inputs."""
    return text_digest(json.dumps(inputs, sort_keys=True))[:16]
