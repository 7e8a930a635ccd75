"""Reads a checkpoint's metadata without its tensors, and without PyTorch, which takes seconds to import."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.saved_codec import read_config, read_header
from pipeline.common.errors import UserError, raised_as
from pipeline.common.files import check_regular, text_digest
from pipeline.common.memory import too_large

FORMAT = "hpcm-checkpoint-2"
ADDED = "hpcm.json"
"""Entry with the lineage that `hpcm export` adds to the zip archive of a `.pth.tar`. Other programs ignore it."""
LARGEST = 2**24
"""Largest size in bytes of this entry."""


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
    """Read what a codec's file or a training state says about itself, without its tensors.

    An official file, which says nothing, has the `config` None. Raises CheckpointError for a file of another program.
    """
    check_file(path)
    if is_official(path):
        return official_metadata(path)
    with raised_as(CheckpointError):
        metadata = read_header(path)
        if not metadata and (saved := read_config(path)):
            return saved
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this pipeline; "
            f"import official weights with `hpcm import {path} baseline.safetensors`"
        )
    if metadata.pop("seal", None) != seal(metadata):
        raise CheckpointError(f"{path}: the metadata does not match its digest; the file is damaged")
    return metadata


def official_metadata(path: Path) -> dict[str, Any]:
    """What a `.pth.tar` says about itself: what `hpcm export` added, or only the name of an official file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(added_entry(archive)) as entry:
            added = json.loads(entry.read(LARGEST))
    except (LookupError, ValueError, RecursionError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        added = None
    return {**(added if isinstance(added, dict) else {"imported_from": path.name}), "config": None}


def added_entry(archive: zipfile.ZipFile) -> str:
    """Name of the entry `ADDED` in a `.pth.tar`, all of whose entries PyTorch expects in one folder."""
    return f"{archive.namelist()[0].split('/')[0]}/{ADDED}"


def read_digest(path: Path) -> str:
    """The digest of the weights that a file's metadata states; raises CheckpointError as `read_metadata` does."""
    return str(read_metadata(path)["digest"])


def seal(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of all metadata except the seal, in hexadecimal."""
    return text_digest(json.dumps(metadata, sort_keys=True))


def inputs_digest(inputs: Mapping[str, str]) -> str:
    """Sixteen hexadecimal digits of a SHA-256 of the digests of a stage's inputs."""
    return text_digest(json.dumps(inputs, sort_keys=True))[:16]
