"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.display import be_quiet

RECIPE = "Recipe and images"
"""A panel of options in `--help`."""
Runs = Annotated[Path, typer.Option(help="Folder of checkpoints and MLflow's store.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.", callback=be_quiet)]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, or cuda:N for one of several GPUs.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting, as in `phase2.seed=1`; repeatable.", rich_help_panel=RECIPE),
]
