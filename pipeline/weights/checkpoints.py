"""Checkpoint files. They are written atomically, checked by digest, and never executed."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modules import HPCM
from modules.bitstream.identity import model_identity
from modules.loading import bare_names, check_fit, nearest_config, read_tensors, state_digest
from modules.loading import codec_tensors as codec_tensors  # for the many that import it from here
from modules.plugins import PluginError, load_installed_plugins
from modules.saved_codec import METADATA_KEY
from pipeline.common.contracts import to_values
from pipeline.common.errors import raised_as
from pipeline.common.files import replacing
from pipeline.weights.metadata import (
    FORMAT,
    CheckpointError,
    check_file,
    is_official,
    official_metadata,
    read_metadata,
    seal,
)
from pipeline.weights.published import Lineage
from pipeline.weights.shipped import codec_file
from pipeline.weights.trained_for import with_loss

MOST_INFLATED = 2
"""Largest ratio of an archive's content to its size; PyTorch stores weights uncompressed."""

LONGEST_ZIP_END = 22 + 2**16
"""Largest size in bytes of a zip archive's end record with its comment."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors and JSON-compatible metadata, which includes `digest` and, in a published checkpoint, `config`."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically. Raises FileError.

    The metadata is stored as JSON, with `digest` (SHA-256 of the tensors) and `seal` (SHA-256 of the metadata) added.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    fields = {**metadata, "format": FORMAT, "digest": state_digest(contiguous)}
    fields["seal"] = seal(fields)
    with replacing(path) as partial:
        # A single entry keeps the bytes reproducible, because safetensors writes several in no fixed order.
        try:
            save_file(contiguous, partial, {METADATA_KEY: json.dumps(fields, sort_keys=True)})
        except SafetensorError as error:  # safetensors raises it when the disk is full
            raise OSError(str(error)) from error


def check_target(source: Path, target: Path, overwrite: bool, ending: str = ".safetensors") -> None:
    """Raise CheckpointError if `target` has another ending, is `source`, or exists and `overwrite` is false."""
    if not target.name.endswith(ending):
        raise CheckpointError(f"{target}: give a name that ends in {ending}")
    if target.exists():
        if source.exists() and target.samefile(source):
            raise CheckpointError(f"{target}: is also the source file; give another name")
        if not overwrite:
            raise CheckpointError(f"{target}: exists; --overwrite replaces it")


def read(path: Path) -> Checkpoint:
    """Read a checkpoint of `write` or `save_pretrained`; raises CheckpointError for other files and a wrong digest."""
    metadata = read_metadata(path)
    with raised_as(CheckpointError):
        return Checkpoint(read_tensors(path, metadata.get("digest")), metadata)


def publish(path: Path, model: HPCM, lineage: Lineage) -> None:
    """Write a codec's checkpoint, which `load_codec` can load without any other file; raises FileError."""
    known = {"config": model.config.to_dict(), "identity": model_identity(model).hex()}
    write(path, codec_tensors(model), {**to_values(lineage), **known})


def load_codec(source: Path | str) -> HPCM:
    """Load a codec in evaluation mode, with its coding tables built and its `lineage`.

    `source` has any form that `codec_file` takes. Raises CheckpointError, naming the tensors, if they do not fit the
    configuration.
    """
    path = codec_file(source)
    with raised_as(CheckpointError, PluginError):
        load_installed_plugins()
    return _built(path, _read_official(path) if is_official(path) else read(path))


def import_official(path: Path) -> HPCM:
    """Load the codec of a `.pth.tar`, official or of `hpcm export`, whatever its name.

    Nothing in it is executed. Raises CheckpointError for a pickle that holds more than tensors and a configuration.
    """
    return _built(path, _read_official(path))


def lineage_of(model: HPCM) -> Lineage:
    """The lineage of a codec that `load_codec` loaded."""
    return Lineage.of(model.lineage, "the codec")


def _built(path: Path, checkpoint: Checkpoint) -> HPCM:
    metadata, lineage = checkpoint.metadata, Lineage.of(checkpoint.metadata, path)
    if "config" not in metadata:
        raise CheckpointError(f"{path}: this is a training state; load the stage's checkpoint.safetensors")
    with raised_as(CheckpointError, prefix=f"{path}: "):
        config = metadata["config"] or nearest_config(checkpoint.tensors).to_dict()
        return HPCM.from_tensors(config, checkpoint.tensors, to_values(with_loss(lineage, path.name)))


def load_weights(model: HPCM, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Load `tensors` into `model`; raises CheckpointError naming missing, unexpected and unusable tensors."""
    with raised_as(CheckpointError, prefix=f"{source}: "):
        check_fit(model, tensors)
    model.load_state_dict(tensors)


def _read_official(source: Path) -> Checkpoint:
    check_file(source)
    _check_inflation(source)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # For a damaged pickle, torch can raise any class.
        if kind := _no_checkpoint(source):
            raise CheckpointError(f"{source}: {kind}") from error
        raise CheckpointError(
            f"{source}: holds more than tensors, or is damaged; refused, because loading it could run code.\n"
            "  If you trust the file, save only its state dict: torch.save(model.state_dict(), …)."
        ) from error
    loaded = loaded if isinstance(loaded, dict) else {}
    state = loaded.get("state_dict", loaded)
    state = bare_names(state) if isinstance(state, dict) and all(isinstance(name, str) for name in state) else {}
    config = state.pop("config", None)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{source}: no state dict; expected a mapping of names to tensors")
    tables = HPCM.coding_table_names()
    tensors = {name: value for name, value in state.items() if name not in tables}
    return Checkpoint(tensors, {**official_metadata(source), "config": config})


def _check_inflation(source: Path) -> None:
    """Raise CheckpointError for an archive whose entries are compressed to far less than their size."""
    try:
        with zipfile.ZipFile(source) as archive:
            held = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # A plain pickle or a damaged file; loading it reports that.
    size = source.stat().st_size
    if held > MOST_INFLATED * size + 2**20:
        raise CheckpointError(
            f"{source}: {size:,} bytes that inflate to {held:,}; refused. PyTorch stores weights uncompressed; "
            "if you trust the file, save it again with torch.save"
        )


def _no_checkpoint(source: Path) -> str:
    """The reason why a file is neither a complete zip archive nor a pickle; "" if it may be one."""
    size = source.stat().st_size
    with source.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, size - LONGEST_ZIP_END))
        end = file.read()
    if start == b"PK\3\4":
        return "" if b"PK\5\6" in end else f"truncated after {size} bytes; copy it again"
    return "" if start[:1] == b"\x80" else "not a PyTorch checkpoint"
