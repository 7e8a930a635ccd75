"""Options that several commands share, and functions that parse them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.common.packaged import recipe_names, stage_names

if TYPE_CHECKING:
    import torch


RECIPE, COST = "Recipe and images", "Time and memory"
"""Panels of options in `--help`."""
MIGRATE, USE, RESULTS = "Migrate a codec", "Use a codec", "Results and measurements"
"""Panels of commands in `--help`."""


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipe_names() if name.startswith(incomplete)]


def _complete_stage(context: typer.Context, incomplete: str) -> list[str]:
    recipe = context.params.get("recipe") or "tiny"
    return [name for name in stage_names(recipe) if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Option(
        help="Name of a packaged recipe, or path to a recipe's folder.",
        autocompletion=_complete_recipe,
        rich_help_panel=RECIPE,
    ),
]
StageName = Annotated[
    str,
    typer.Argument(help="The stage to build, such as phase4, after its ancestors.", autocompletion=_complete_stage),
]
DataFolder = Annotated[
    str | None,
    typer.Option(help="Folder of training images [default: packaged photographs].", rich_help_panel=RECIPE),
]
ValFolder = Annotated[
    str | None,
    typer.Option(help="Folder of validation images [default: packaged photographs].", rich_help_panel=RECIPE),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting, as in `phase2.seed=1`; repeatable.", rich_help_panel=RECIPE),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        help="Use this checkpoint (.safetensors or official .pth.tar) as the first stage instead of training it.",
        rich_help_panel=RECIPE,
    ),
]
Runs = Annotated[Path, typer.Option(help="Folder of checkpoints and MLflow's store.")]
AcceptAnyway = Annotated[
    bool, typer.Option("--accept-anyway", help="Publish stages even if they exceed the limits in `accept`.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Answer yes to all questions: rebuild stages and move files.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print a line every `log_every` steps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, or cuda:N for one of several GPUs.")]

Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Train a few steps of each segment, and show time and memory; exits 1 if a segment does not fit.",
        rich_help_panel=COST,
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        min=1,
        help="With --measure: number of processes that will share a batch; one is measured.",
        rich_help_panel=COST,
    ),
]


def overrides_of(data: str | None, val: str | None, lmbda: float | None, settings: list[str] | None) -> list[str]:
    """The options as overrides of a recipe; those of `--set` come last and win."""
    given = {"data.train": data, "data.val": val, "lmbda": lmbda}
    return [*(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None), *(settings or [])]


def device_of(name: str) -> "torch.device":
    """The device of this name; raises BadParameter if it is unknown or missing."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"--device {name}: give cpu, cuda or cuda:N")

    import torch

    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA device here")
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def size_of(text: str) -> tuple[int, int]:
    """Height and width in pixels from `512x768`; raises BadParameter."""
    found = re.fullmatch("([1-9][0-9]*)[xX×]([1-9][0-9]*)", text)
    if not found:
        raise typer.BadParameter(f"{text!r}: expected HEIGHTxWIDTH in pixels, such as 512x768")
    return int(found[1]), int(found[2])
