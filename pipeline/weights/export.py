"""Published checkpoints in half precision, to ship: half the bytes, for a change that bits and PSNR hardly show."""

from pathlib import Path

import torch
import yaml

from modules.bitstream import model_identity
from pipeline.common.contracts import to_values
from pipeline.weights.checkpoints import CheckpointError, codec_tensors, load_codec, write
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage


def export_half(source: Path, target: Path) -> None:
    """Write the codec of `source`, its parameters rounded to float16, as a checkpoint that `load_codec` reads.

    Raises CheckpointError where `source` is no published checkpoint, and for a weight beyond float16's range.
    """
    model = load_codec(source)
    # Parameters alone: of the buffers, the likelihoods' bound of 1e-9 would become 0.
    halves = {name: parameter.half() for name, parameter in model.named_parameters()}
    for name, tensor in halves.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds values beyond float16's range")
    full = Lineage.read(source)
    stage = _without_paths(full.stage) if full.stage else None
    for name, parameter in model.named_parameters():
        parameter.data = halves[name].float()  # What `load_codec` will make of them.
    # What was measured is no longer true of the weights when they are rounded.
    lineage = Lineage(
        name=full.name,
        stage=stage,
        code=full.code,
        identity=model_identity(model).hex(),
        exported_from=read_digest(source),
    )
    metadata = {"config": model.config.to_dict(), **to_values(lineage)}
    write(target, {**codec_tensors(model), **halves}, metadata)


def _without_paths(stage: str) -> str:
    """A stage's YAML without the folders that its images lay in: they say nothing elsewhere."""
    fields = yaml.safe_load(stage)
    fields["data"] |= {"train": None, "val": None}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)
