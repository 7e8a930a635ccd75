"""The options that select chains, and those for running and measuring them."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from pipeline.chain.chain import Chain
from pipeline.chain.plan import ChainError
from pipeline.chain.root_loss import RootLoss, root_loss, root_weights
from pipeline.commands.checkpoint_info import Codec
from pipeline.commands.options import RECIPE, Quiet, Runs, Settings
from pipeline.common.packaged import recipe_names, stage_names
from pipeline.recipes.loading import load_recipe


def _stages(context: typer.Context) -> list[str]:
    return stage_names(context.params.get("recipe") or "tiny")


StageName = Annotated[
    str,
    typer.Argument(help="The stage to build, such as phase4, after its ancestors.", autocompletion=_stages),
]


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe, the images and settings that replace its own, and the folder of runs."""

    PANEL = RECIPE

    recipe: Annotated[str, typer.Option(autocompletion=recipe_names)] = "tiny"
    """Name of a packaged recipe, or path to a recipe's folder."""
    data: str | None = None
    """Folder of training images [default: packaged photographs]."""
    val: str | None = None
    """Folder of validation images [default: packaged photographs]."""
    settings: Settings = None
    name: str | None = None
    """Keep the results beside those of the recipe itself, in `<recipe>-<name>`."""
    runs: Runs = Path("runs")

    def overrides(self, **more: float | None) -> tuple[str, ...]:
        """The options, and `more` settings, as overrides of the recipe; those of `--set` come last and win."""
        given = {"data.train": self.data, "data.val": self.val, **more}
        options = (f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)
        return (*options, *(self.settings or ()))

    def build(
        self,
        stage: str,
        overrides: tuple[str, ...],
        baseline: Path | None,
        start: Path | None = None,
        scratch: bool = False,
    ) -> Chain:
        """The chain to a stage; for its root see `ChainOptions`. Raises RecipeError and ChainError."""
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ChainError(
                f"--name {self.name}: give letters, digits, `_`, `-` and `.`, which a folder's name may have"
            )
        recipe, file, loss = load_recipe(self.recipe, overrides), baseline or start, RootLoss()
        if file is not None:
            loss = root_loss(recipe.chain(stage)[0], file, file is start, overrides)
            recipe = load_recipe(self.recipe, (*overrides, *loss.overrides))
        if not (file or scratch):
            baseline = root_weights(recipe, recipe.chain(stage)[0])
        if self.name:
            recipe = replace(recipe, name=f"{recipe.name}-{self.name}")
        chain = Chain(recipe, stage, self.runs, baseline, start)
        chain.note, chain.doubt = loss.note, loss.doubt
        return chain


@dataclass(frozen=True)
class ChainOptions(RecipeOptions):
    """One chain of a recipe."""

    baseline: Codec = None
    """Use this codec as the first stage instead of training it. `hpcm info --help` lists the forms of a codec."""
    lmbda: float | None = None
    """λ of the rate-distortion loss [default: that of --baseline or --start, else the recipe's]."""
    start: Codec = None
    """Train the first stage from this codec's weights instead of random ones."""
    scratch: bool = False
    """Train the first stage, even if the recipe has trained weights for it."""

    def chain(self, stage: str) -> Chain:
        """The chain to a stage. Raises BadParameter, RecipeError and ChainError."""
        if sum(map(bool, (self.baseline, self.start, self.scratch))) > 1:
            raise typer.BadParameter(
                "give only one of --baseline (not trained), --start (trained further) and --scratch"
            )
        return self.build(stage, self.overrides(lmbda=self.lmbda), self.baseline, self.start, self.scratch)


@dataclass(frozen=True)
class RunOptions:
    """How chains run."""

    accept_anyway: bool = False
    """Publish stages even if they exceed the limits in `accept`."""
    yes: Annotated[bool, typer.Option("--yes", "-y")] = False
    """Answer yes to all questions: rebuild stages and move files."""
    quiet: Quiet = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False
    """Print a line every `log_every` steps."""


@dataclass(frozen=True)
class MeasureOptions:
    """Whether and how the stages of a plan are measured."""

    PANEL = "Time and memory"

    measure: bool = False
    """Train a few steps of each segment, and show time and memory; exits 1 if a segment does not fit."""
    processes: Annotated[int, typer.Option(min=1)] = 1
    """With --measure: number of processes that will share a batch; one is measured."""
