"""`hpcm import`: an official checkpoint as safetensors."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from modules.config import preset_of
from pipeline.commands.display import console
from pipeline.weights.checkpoints import check_target, import_official, lineage_of, publish


def import_(
    source: Annotated[Path, typer.Argument(help="An official HPCM checkpoint, such as HPCM-Base_0.013.pth.tar.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Convert an official `.pth.tar` checkpoint to safetensors. The preset is recognized from the tensors."""
    check_target(source, target, overwrite)
    model = import_official(source)
    preset, phase = preset_of(model.config)
    publish(target, model, replace(lineage_of(model), name="baseline"))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(f"{target}: preset {preset}, {f'Phase {phase}' if phase else 'Baseline'}, {size:.1f} M parameters")
