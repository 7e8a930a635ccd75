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
    publish(target, model, replace(lineage_of(model), name="baseline"))
    kind, size = "settings of its own", sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if found := preset_of(model.config):
        kind = f"preset {found[0]}, {f'Phase {found[1]}' if found[1] else 'Baseline'}"
    console.print(f"{target}: {kind}, {size:.1f} M parameters")
