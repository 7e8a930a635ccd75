"""Exports published checkpoints to other files: in half precision, and for CompressAI's tools."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from modules.bitstream.identity import model_identity
from pipeline.common.contracts import to_values
from pipeline.common.files import replacing
from pipeline.weights.checkpoints import CheckpointError, check_target, codec_tensors, lineage_of, load_codec, write
from pipeline.weights.metadata import added_entry


def export_half(source: Path, target: Path, overwrite: bool = False) -> None:
    """Write the codec of `source`, with its parameters rounded to float16, as a checkpoint for `load_codec`.

    The file has half the bytes; rate and PSNR hardly change. Raises CheckpointError if `source` is not a published
    checkpoint or has a weight beyond float16's range, and if `target` exists and `overwrite` is false.
    """
    check_target(source, target, overwrite)
    model = load_codec(source)
    # Only parameters are rounded: in the buffers, the likelihood bound of 1e-9 would become 0.
    halves = {name: parameter.half() for name, parameter in model.named_parameters()}
    for name, tensor in halves.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds values beyond float16's range")
    full = lineage_of(model)
    stage = _without_paths(full.stage) if full.stage else None
    for name, parameter in model.named_parameters():
        parameter.data = halves[name].float()  # The same values that `load_codec` will read.
    # The quality was measured before rounding.
    identity, digest = model_identity(model).hex(), model.lineage["digest"]
    lineage = replace(full, stage=stage, quality=None, validation=None, identity=identity, exported_from=digest)
    metadata = {"config": model.config.to_dict(), **to_values(lineage)}
    write(target, {**codec_tensors(model), **halves}, metadata)


def export_compressai(source: Path, target: Path, overwrite: bool = False) -> None:
    """Write weights and configuration as the state dict that `HPCM.from_state_dict` reads (`modules.compressai_tools`).

    Raises CheckpointError as `export_half` does.
    """
    check_target(source, target, overwrite, ".pth.tar")
    model = load_codec(source)
    with replacing(target) as partial:
        state = {**codec_tensors(model), "config": model.config.to_dict()}
        torch.save({"state_dict": state}, partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.writestr(added_entry(archive), json.dumps(dict(model.lineage)))


def _without_paths(stage: str) -> str:
    """A stage's YAML without the paths of its images, which mean nothing on another machine."""
    fields = yaml.safe_load(stage)
    fields["data"] |= {"train": None, "val": None}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)
