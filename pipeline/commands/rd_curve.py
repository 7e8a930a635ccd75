"""`hpcm rd-curve`: a recipe at several λ, and the curves of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from pipeline.chain.lambda_sweep import Points, leaves, plan_of, sweep_table
from pipeline.chain.plan import ChainError
from pipeline.commands.chain_options import MeasureOptions, RecipeOptions, RunOptions
from pipeline.commands.checkpoint_info import codec_path
from pipeline.commands.display import IS_FIRST_PROCESS, console, show
from pipeline.commands.lazy import imported_when_called
from pipeline.common.tables import shortest
from pipeline.recipes.loading import load_recipe
from pipeline.weights.trained_for import LMBDAS, trained_for

run_planned = imported_when_called("pipeline.commands.running:run_planned")
show_measured = imported_when_called("pipeline.commands.measured_plan:show_measured")
draw_curves = imported_when_called("pipeline.commands.curves:draw_curves")


@dataclass(frozen=True)
class SweepOptions(RecipeOptions):
    """The λ and seeds of a sweep."""

    lmbda: list[float] | None = None
    """λ to train at; repeatable [default: those of --baseline, else the six of the official codecs for the recipe's
    metric]."""
    seed: list[int] | None = None
    """Seed of all stages; repeatable, to train several chains per λ."""
    baseline: Annotated[list[Path] | None, typer.Option(parser=codec_path, metavar="CODEC")] = None
    """Use this codec as the first stage at its λ instead of training it; repeatable, with one codec for each λ."""

    def points(self, targets: Sequence[str]) -> Points:
        """Every λ and seed, with chains to these stages, or to all without children. Raises RecipeError, ChainError."""
        metric = next(iter(load_recipe(self.recipe, self.overrides()).stages.values())).metric
        given = self.baseline or []
        baselines = {trained.lmbda: file for file in given if (trained := trained_for(file))}
        lmbdas = sorted(self.lmbda or baselines or LMBDAS.get(metric, ()))
        if not lmbdas:
            raise ChainError(f"no official codec was trained for {metric}; give the λ with --lmbda")
        if len(given) == len(lmbdas) == 1:
            baselines = {lmbdas[0]: given[0]}
        if given and (len(baselines) < len(given) or not baselines.keys() >= set(lmbdas)):
            known, wanted = (", ".join(map(shortest, sorted(found))) for found in (baselines, lmbdas))
            told = f"those given are for λ = {known}" if known else "no file given says for which λ it is"
            raise ChainError(f"--baseline: give one codec for each λ ({wanted}); {told}")
        points = {}
        for lmbda, seed in product(lmbdas, self.seed or (None,)):
            title, overrides = shortest(lmbda), (*self.overrides(), f"lmbda={lmbda!r}")
            if seed is not None:
                title, overrides = f"{title} seed {seed}", (*overrides, f"seed={seed}")
            stages = targets or leaves(load_recipe(self.recipe, overrides))
            points[title] = [self.build(stage, overrides, baselines.get(lmbda)) for stage in stages]
        return points


def rd_curve(
    options: SweepOptions,
    running: RunOptions,
    measuring: MeasureOptions,
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Stages to build at every λ [default: all stages that are not the parent of another]."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what is done and what is left, and exit.")] = False,
) -> None:
    """Run a recipe at several λ and plot rate–distortion curves from real bitstreams.

    Each λ and seed has its own chain. Repeat the command to continue an interrupted run.
    """
    points = partial(options.points, targets or [])
    if measuring.measure:
        plans = {title: list(plan_of(chains).values()) for title, chains in points().items()}
        show_measured(plans, measuring.processes)
        return
    show(sweep_table(options.recipe, points()))
    if plan:
        return
    for title, chains in points().items():
        for chain in chains:
            console.print(f"λ = {title}, to {chain.tasks[-1].stage.name}")
            run_planned(chain, chain.plan(), running)
        show(sweep_table(options.recipe, points()))
    if IS_FIRST_PROCESS:
        draw_curves(points())
