"""`hpcm run`: build a stage and its ancestors."""

from typing import Annotated

import typer

from pipeline.commands.chain_options import ChainOptions, RunOptions, StageName
from pipeline.commands.chain_tables import closing_table, plan_table
from pipeline.commands.display import console, show
from pipeline.commands.lazy import imported_when_called

run_planned = imported_when_called("pipeline.commands.running:run_planned")


def run(
    stage: StageName,
    options: ChainOptions,
    running: RunOptions,
    force: Annotated[bool, typer.Option("--force", help="Build the stage again, even if it is current.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Restart interrupted training instead of resuming it.")
    ] = False,
) -> None:
    """Build a stage and its ancestors. Stages that are current are skipped; an interrupted stage is resumed.

    Ctrl-C and SIGTERM save and exit. Repeat the command to continue.
    For several processes: `accelerate launch --num_processes 2 -m pipeline run phase4`.
    """
    chain = options.chain(stage)
    planned = chain.plan(force)
    show(plan_table(chain, planned))
    run_planned(chain, planned, running, force, fresh)
    show(closing_table(chain))
    pictures = chain.tasks[-1].folder / "reconstructions"
    if pictures.is_dir():
        console.print(f"Images beside their reconstructions: {pictures}")
    console.print(f"MLflow's pages on these runs: hpcm ui --runs {options.runs}")
