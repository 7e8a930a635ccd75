"""`hpcm plan`: what `hpcm run` would do, and why."""

from typing import Annotated

import typer

from pipeline.commands.chain_options import ChainOptions, MeasureOptions, StageName
from pipeline.commands.chain_tables import plan_json, plan_table
from pipeline.commands.display import show, show_json
from pipeline.commands.lazy import imported_when_called
from pipeline.commands.options import AsJson

check_stages = imported_when_called("pipeline.chain.precheck:check_stages")
show_measured = imported_when_called("pipeline.commands.measured_plan:show_measured")


def plan(
    options: ChainOptions,
    measuring: MeasureOptions,
    stage: StageName = "phase4",
    check: Annotated[
        bool,
        typer.Option("--check", help="Check also names and shapes of tensors, as `run` does first; takes seconds."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what `run` would do, and why. With `--measure`, show also how long it takes and whether it fits."""
    chain = options.chain(stage)
    found = chain.plan()
    if as_json:
        show_json(plan_json(chain, found))
    else:
        show(plan_table(chain, found))
    if check:
        check_stages(chain.tasks)
    if measuring.measure:
        show_measured({stage: found}, measuring.processes)
