"""The options that select chains, and those for running and measuring them."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipeline.chain.chain import Chain
from pipeline.chain.request import ChainRequest, Rebuild
from pipeline.commands.confirmation import confirm
from pipeline.commands.options import Quiet, Runs, Settings
from pipeline.common.packaged import recipe_names, stage_names

RECIPE, COST = "Recipe and images", "Time and memory"
"""Panels of options in `--help`."""


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipe_names() if name.startswith(incomplete)]


def _complete_stage(context: typer.Context, incomplete: str) -> list[str]:
    recipe = context.params.get("recipe") or "tiny"
    return [name for name in stage_names(recipe) if name.startswith(incomplete)]


StageName = Annotated[
    str,
    typer.Argument(help="The stage to build, such as phase4, after its ancestors.", autocompletion=_complete_stage),
]


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe, the images and settings that replace its own, and the folder of runs."""

    recipe: Annotated[
        str,
        typer.Option(
            help="Name of a packaged recipe, or path to a recipe's folder.",
            autocompletion=_complete_recipe,
            rich_help_panel=RECIPE,
        ),
    ] = "tiny"
    data: Annotated[
        str | None,
        typer.Option(help="Folder of training images [default: packaged photographs].", rich_help_panel=RECIPE),
    ] = None
    val: Annotated[
        str | None,
        typer.Option(help="Folder of validation images [default: packaged photographs].", rich_help_panel=RECIPE),
    ] = None
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Use this checkpoint (.safetensors or official .pth.tar) as the first stage instead of training it.",
            rich_help_panel=RECIPE,
        ),
    ] = None
    settings: Settings = None
    runs: Runs = Path("runs")

    def overrides(self, lmbda: float | None = None) -> tuple[str, ...]:
        """The options as overrides of the recipe; those of `--set` come last and win."""
        given = {"data.train": self.data, "data.val": self.val, "lmbda": lmbda}
        return (
            *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None),
            *(self.settings or ()),
        )


@dataclass(frozen=True)
class ChainOptions(RecipeOptions):
    """One chain of a recipe."""

    lmbda: Annotated[
        float | None,
        typer.Option(
            help="λ of the rate-distortion loss [default: that of --baseline or --start, else the recipe's].",
            rich_help_panel=RECIPE,
        ),
    ] = None
    start: Annotated[
        Path | None,
        typer.Option(
            help="Train the first stage from this checkpoint's weights instead of random ones.", rich_help_panel=RECIPE
        ),
    ] = None
    scratch: Annotated[
        bool,
        typer.Option(
            "--scratch",
            help="Train the first stage, even if the recipe has trained weights for it.",
            rich_help_panel=RECIPE,
        ),
    ] = False

    def chain(self, stage: str) -> Chain:
        """The chain to a stage. Raises BadParameter, RecipeError and ChainError."""
        if sum(map(bool, (self.baseline, self.start, self.scratch))) > 1:
            raise typer.BadParameter(
                "give only one of --baseline (not trained), --start (trained further) and --scratch"
            )
        overrides = self.overrides(self.lmbda)
        return ChainRequest(self.recipe, overrides, stage, self.runs, self.baseline, self.start, self.scratch).chain()


@dataclass(frozen=True)
class RunOptions:
    """How chains run."""

    accept_anyway: Annotated[
        bool, typer.Option("--accept-anyway", help="Publish stages even if they exceed the limits in `accept`.")
    ] = False
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Answer yes to all questions: rebuild stages and move files.")
    ] = False
    quiet: Quiet = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line every `log_every` steps.")] = False

    def rebuild(self, force: bool = False, fresh: bool = False) -> Rebuild:
        """What to rebuild, and the question that is asked first."""
        return Rebuild(force, fresh, partial(confirm, self.yes))


@dataclass(frozen=True)
class MeasureOptions:
    """Whether and how the stages of a plan are measured."""

    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Train a few steps of each segment, and show time and memory; exits 1 if a segment does not fit.",
            rich_help_panel=COST,
        ),
    ] = False
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="With --measure: number of processes that will share a batch; one is measured.",
            rich_help_panel=COST,
        ),
    ] = 1
