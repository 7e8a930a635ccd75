"""`hpcm rd-curve`: a recipe at several λ, and the curves of its stages."""

from dataclasses import dataclass
from typing import Annotated

import typer

from pipeline.chain.lambda_sweep import LMBDAS, Sweep
from pipeline.commands.chain_options import MeasureOptions, RecipeOptions, RunOptions
from pipeline.commands.display import IS_FIRST_PROCESS, console, show
from pipeline.commands.lazy import imported_when_called

run_planned = imported_when_called("pipeline.commands.running:run_planned")
show_measured = imported_when_called("pipeline.commands.measured_plan:show_measured")
draw_curves = imported_when_called("pipeline.commands.curves:draw_curves")


@dataclass(frozen=True)
class SweepOptions(RecipeOptions):
    """The λ and seeds of a sweep."""

    lmbda: list[float] | None = None
    """λ to train at; repeatable [default: the six λ of the official codecs]."""
    seed: list[int] | None = None
    """Seed of all stages; repeatable, to train several chains per λ."""

    def sweep(self, targets: list[str]) -> Sweep:
        """The sweep to these stages."""
        lmbdas, seeds = tuple(self.lmbda or LMBDAS), tuple(self.seed or ())
        return Sweep(self.recipe, self.overrides(), tuple(targets), lmbdas, self.runs, self.baseline, seeds)


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
    sweep = options.sweep(targets or [])
    if measuring.measure:
        plans = {point.title: list(point.plan().values()) for point in sweep.points()}
        show_measured(plans, measuring.processes)
        return
    show(sweep.table())
    if plan:
        return
    for point in sweep.points():
        for chain in point.chains:
            console.print(f"λ = {point.title}, to {chain.tasks[-1].stage.name}")
            run_planned(chain, chain.plan(), running)
        show(sweep.table())
    if IS_FIRST_PROCESS:
        draw_curves(sweep)
