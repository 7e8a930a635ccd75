"""Options that several commands have, and what they make of a recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Option(help="Folder under stages/, or a path to one of your own.")]
DataFolder = Annotated[str | None, typer.Option(help="Folder of training images [default: packaged photographs].")]
ValFolder = Annotated[str | None, typer.Option(help="Folder of validation images [default: packaged photographs].")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as in `phase2.seed=1`.")]
Baseline = Annotated[Path | None, typer.Option(help="Start from this codec (.safetensors, official .pth.tar).")]
Runs = Annotated[Path, typer.Option(help="Folder of checkpoints and of the MLflow store.")]
AcceptAnyway = Annotated[bool, typer.Option(help="Publish stages that miss their limits.")]


def overrides_of(data: str | None, val: str | None, lmbda: float | None, settings: list[str] | None) -> list[str]:
    """The options as overrides of a recipe, `--set` last."""
    given = {"data.train": data, "data.val": val, "lmbda": lmbda}
    return [*(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None), *(settings or [])]
